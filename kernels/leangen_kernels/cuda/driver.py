"""The CUDA driver through ctypes: which cards there are, and launching our kernels on one.

For `doctor`, the self-test and benchmarks; under ONNX Runtime `native/cuda.c` does this. No toolkit
is needed, only the driver's own library.
"""

from __future__ import annotations

import ctypes
import functools
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from leangen_kernels.cuda.launches import Launch

LIBRARY = "libcuda.so.1"
FOLDER = Path(__file__).parent
PTX, MACHINE_CODE = "leangen_cuda.sm_{}.ptx", "leangen_cuda.sm_{}.cubin"
NAMES = "leangen_cuda.txt"
OVERLAPPING = 9
"""The compute capability from which a launch may begin before those ahead of it are complete."""

_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS, _L2_BYTES = 75, 76, 16, 38
_MAY_OVERLAP = 6  # CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_RELAXED = 2  # a capture that lets other threads allocate
_OUT_OF_MEMORY = 2


class CudaError(Exception):
    """The driver refused something; the message says what and why."""


class OutOfMemoryError(CudaError):
    """The card has no room for an allocation."""


@dataclass(frozen=True, slots=True)
class Device:
    """One card."""

    index: int
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    multiprocessors: int


@functools.cache
def _library() -> Any:
    try:
        library = ctypes.CDLL(LIBRARY)
    except OSError as error:
        raise CudaError(f"no NVIDIA driver: {LIBRARY} cannot be loaded") from error
    _check(library, "cuInit", 0)
    return library


def _check(library: Any, function: str, *arguments: Any) -> None:
    status = getattr(library, function)(*arguments)
    if status == 0:
        return
    text = ctypes.c_char_p()
    library.cuGetErrorString(status, ctypes.byref(text))
    said = (text.value or b"unknown error").decode()
    kind = OutOfMemoryError if status == _OUT_OF_MEMORY else CudaError
    raise kind(f"{function}: {said} ({status})")


def call(function: str, *arguments: Any) -> None:
    """One function of the driver. Raises CudaError."""
    _check(_library(), function, *arguments)


def devices() -> list[Device]:
    """The cards that the driver shows to this process. Raises CudaError without a driver."""
    count = ctypes.c_int()
    call("cuDeviceGetCount", ctypes.byref(count))
    return [_device(index) for index in range(count.value)]


def _device(index: int) -> Device:
    handle, name, memory = ctypes.c_int(), ctypes.create_string_buffer(256), ctypes.c_size_t()
    call("cuDeviceGet", ctypes.byref(handle), index)
    call("cuDeviceGetName", name, 256, handle)
    call("cuDeviceTotalMem_v2", ctypes.byref(memory), handle)
    major, minor, processors = (
        attribute(index, which)
        for which in (_CAPABILITY_MAJOR, _CAPABILITY_MINOR, _MULTIPROCESSORS)
    )
    return Device(index, name.value.decode(), (major, minor), memory.value, processors)


def copy_within(index: int, places: Iterable[tuple[int, int]], size_bytes: int) -> None:
    """Copy `size_bytes` within a card's memory for each (to, from); done when it returns.

    The memory is of the primary context, in which CUDA's runtime works and so ONNX Runtime does.
    Raises CudaError.
    """
    context = ctypes.c_void_p()
    call("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
    try:
        call("cuCtxPushCurrent_v2", context)
        try:
            for to, source in places:
                call("cuMemcpyDtoD_v2", ctypes.c_void_p(to), ctypes.c_void_p(source),
                     ctypes.c_size_t(size_bytes))  # fmt: skip
            call("cuCtxSynchronize")  # such copies go on after the call
        finally:
            call("cuCtxPopCurrent_v2", ctypes.byref(ctypes.c_void_p()))
    finally:
        call("cuDevicePrimaryCtxRelease_v2", index)


def attribute(index: int, which: int) -> int:
    """One of CUdevice_attribute."""
    value = ctypes.c_int()
    call("cuDeviceGetAttribute", ctypes.byref(value), which, index)
    return value.value


def compiled(capability: tuple[int, int], folder: Path = FOLDER) -> Path:
    """The machine code for a card, else the PTX. Raises CudaError where neither was built."""
    machine_code = folder / MACHINE_CODE.format(capability[0] * 10)
    oldest = 80 if capability[0] < OVERLAPPING else 90
    found = machine_code if machine_code.exists() else folder / PTX.format(oldest)
    if not found.exists():
        raise CudaError(
            f"no GPU kernels in {folder}: pip install 'leangen[cuda-build]', then "
            "python -m leangen_kernels.cuda.build"
        )
    return found


class _Attribute(ctypes.Structure):
    """CUlaunchAttribute."""

    _fields_ = (("id", ctypes.c_int), ("_", ctypes.c_int), ("value", ctypes.c_int * 16))


class _Config(ctypes.Structure):
    """CUlaunchConfig."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3), ("block", ctypes.c_uint * 3), ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p), ("attributes", ctypes.POINTER(_Attribute)),
        ("count", ctypes.c_uint),
    )  # fmt: skip


@dataclass
class DeviceArray:
    """Values in a card's memory."""

    address: int
    count: int
    dtype: np.dtype[Any]

    def get(self) -> np.ndarray[Any, Any]:
        """A copy of them, once all launches are done."""
        values: np.ndarray[Any, Any] = np.empty(self.count, self.dtype)
        call("cuCtxSynchronize")
        source = ctypes.c_void_p(self.address)
        call("cuMemcpyDtoH_v2", ctypes.c_void_p(values.ctypes.data), source,
             ctypes.c_size_t(values.nbytes))  # fmt: skip
        return values


class Card:
    """One card with our kernels loaded, in its primary context, which PyTorch shares."""

    def __init__(self, index: int = 0, folder: Path = FOLDER) -> None:
        found = devices()
        if index >= len(found):
            raise CudaError(f"device {index} of {len(found)}: there is no such card")
        self.device = found[index]
        self.multiprocessors = self.device.multiprocessors
        self.overlaps = self.device.capability[0] >= OVERLAPPING
        """Whether launches may; a benchmark sets it to False to see what that is worth."""
        self.l2_bytes = attribute(index, _L2_BYTES)
        context = ctypes.c_void_p()
        call("cuDevicePrimaryCtxRetain", ctypes.byref(context), index)
        call("cuCtxSetCurrent", context)
        self.stream = ctypes.c_void_p()
        call("cuStreamCreate", ctypes.byref(self.stream), 0)
        self.loaded = compiled(self.device.capability, folder)
        self._module = ctypes.c_void_p()
        call("cuModuleLoadData", ctypes.byref(self._module), self.loaded.read_bytes() + b"\0")
        lines = (folder / NAMES).read_text(encoding="utf-8").splitlines()
        self._letters = {name: letters for name, letters, _ in map(str.split, lines)}
        self._functions: dict[str, ctypes.c_void_p] = {}
        self._taken: set[int] = set()

    def empty(self, count: int, kind: Any) -> DeviceArray:
        """Memory with nothing sensible in it (0xAA): what a kernel must write shows."""
        dtype = np.dtype(kind)
        pointer = ctypes.c_void_p()
        size = ctypes.c_size_t(max(count * dtype.itemsize, 1))
        call("cuMemAlloc_v2", ctypes.byref(pointer), size)
        self._taken.add(pointer.value or 0)
        call("cuMemsetD8_v2", pointer, 0xAA, size)
        return DeviceArray(pointer.value or 0, count, dtype)

    def array(self, values: Any) -> DeviceArray:
        """A copy of an array."""
        values = np.ascontiguousarray(values)
        made = self.empty(values.size, values.dtype)
        call("cuMemcpyHtoD_v2", ctypes.c_void_p(made.address), ctypes.c_void_p(values.ctypes.data),
             ctypes.c_size_t(values.nbytes))  # fmt: skip
        return made

    def free(self, *arrays: DeviceArray) -> None:
        """Give memory back."""
        for array in arrays:
            self._release(array.address)

    def free_all(self) -> None:
        """Give back all memory that was taken and not given back since."""
        for address in list(self._taken):
            self._release(address)

    def _release(self, address: int) -> None:
        self._taken.remove(address)
        call("cuMemFree_v2", ctypes.c_void_p(address))

    def launch(
        self, name: str, grid: tuple[int, ...], threads: int, *arguments: int | float
    ) -> None:
        """Launch one kernel on the card's stream. Raises CudaError, ValueError on its arguments."""
        letters = self._letters[name]
        if len(letters) != len(arguments):
            raise ValueError(f"{name} takes {len(letters)} arguments, not {len(arguments)}")
        held = [
            ctypes.c_float(value) if letter == "f" else ctypes.c_int64(int(value))
            for letter, value in zip(letters, arguments, strict=True)
        ]
        pointers = (ctypes.c_void_p * len(held))(
            *(ctypes.cast(ctypes.pointer(value), ctypes.c_void_p) for value in held)
        )
        overlap = _Attribute(_MAY_OVERLAP, 0, (ctypes.c_int * 16)(1))
        config = _Config(
            grid, (threads, 1, 1), 0, self.stream, ctypes.pointer(overlap), int(self.overlaps)
        )
        call("cuLaunchKernelEx", ctypes.byref(config), self._function(name), pointers, None)

    def launch_all(self, launches: Iterable[Launch]) -> None:
        """Launch several, in order."""
        for one in launches:
            self.launch(one.name, one.grid, one.threads, *one.arguments)

    def _function(self, name: str) -> ctypes.c_void_p:
        if name not in self._functions:
            function = ctypes.c_void_p()
            call("cuModuleGetFunction", ctypes.byref(function), self._module,
                 f"leangen_{name}".encode())  # fmt: skip
            self._functions[name] = function
        return self._functions[name]

    def graph(self, enqueue: Callable[[], None]) -> Callable[[], None]:
        """What `enqueue` puts on the stream, as one graph: a function that launches it."""
        graph, executable = ctypes.c_void_p(), ctypes.c_void_p()
        call("cuStreamBeginCapture_v2", self.stream, _RELAXED)
        try:
            enqueue()
        finally:
            call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
        call("cuGraphInstantiateWithFlags", ctypes.byref(executable), graph, ctypes.c_uint64(0))
        call("cuGraphDestroy", graph)
        return lambda: call("cuGraphLaunch", executable, self.stream)

    def copy(self, to: DeviceArray, source: DeviceArray) -> None:
        """Copy within the card, on its stream."""
        size = ctypes.c_size_t(source.count * source.dtype.itemsize)
        call("cuMemcpyDtoDAsync_v2", ctypes.c_void_p(to.address), ctypes.c_void_p(source.address),
             size, self.stream)  # fmt: skip

    def wait(self) -> None:
        """Until all that is on the stream is done."""
        call("cuStreamSynchronize", self.stream)

    def elapsed_s(self, work: Callable[[], None]) -> float:
        """Seconds between events on the stream around `work`."""
        events = [ctypes.c_void_p() for _ in range(2)]
        for event in events:
            call("cuEventCreate", ctypes.byref(event), 0)
        call("cuEventRecord", events[0], self.stream)
        work()
        call("cuEventRecord", events[1], self.stream)
        call("cuEventSynchronize", events[1])
        milliseconds = ctypes.c_float()
        call("cuEventElapsedTime", ctypes.byref(milliseconds), *events)
        for event in events:
            call("cuEventDestroy_v2", event)
        return milliseconds.value / 1e3
