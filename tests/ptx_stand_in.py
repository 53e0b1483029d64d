"""A pytest plugin: a card that runs the compiled kernels' PTX on the CPU, for `pytest -m gpu`.

Leangen's own code, the operators in C and ONNX Runtime are what a user of a card has, but for what
only CUDA's ONNX Runtime brings: its other operators and memory are the CPU provider's. The driver
is `fake_cuda.c`, whose launches `ptx_card` runs. Wants LD_LIBRARY_PATH and PTX_STAND_IN to be the
folder that `fake_card` filled, with the kernels in `cuda`.
"""

import ctypes
import dataclasses
import os
from pathlib import Path

import leangen_kernels
import numpy as np
import ptx
import ptx_card
from leangen_kernels.cuda import driver

from leangen import devices, lowering
from leangen.families import key_values

_RUN = ctypes.CFUNCTYPE(
    ctypes.c_int, ctypes.c_char_p, ctypes.POINTER(ctypes.c_uint), ctypes.c_uint,
    ctypes.POINTER(ctypes.c_void_p),
)  # fmt: skip
_LOWEST = 1 << 16


class Everywhere:
    """All of this process's memory, where nobody watches."""

    def __init__(self):
        # What ONNX Runtime allocates is known to nobody else; nothing is read but what is asked.
        self.data = np.frombuffer((ctypes.c_uint8 * (1 << 47)).from_address(_LOWEST), np.uint8)

    def load(self, at, by, constant, early):
        return self.data[at]

    def store(self, at, by, values):
        self.data[at] = values


class Card(ptx_card.Card):
    """Runs kernels over whatever the addresses of their arguments say."""

    memory = Everywhere()

    def find(self, addresses, size):
        if addresses.min() < _LOWEST:
            raise ptx_card.Fault(f"address {addresses.min()}")
        at = (addresses - np.uint64(_LOWEST)).astype(np.int64)
        yield self.memory, np.arange(addresses.size), at


def _runs(kernels):
    """The function that does a launch; 1 where the kernel is at fault, which is printed."""

    @_RUN
    def run(name, grid, threads, arguments):
        kernel = kernels[f"leangen_{name.decode()}"]
        kinds = {"u64": ctypes.c_int64, "f32": ctypes.c_float}
        values = [
            ctypes.cast(arguments[at], ctypes.POINTER(kinds[kind]))[0]
            for at, kind in enumerate(kernel.parameters.values())
        ]
        try:
            Card(kernels).launch(name.decode(), tuple(grid[:3]), threads, *values)
        except Exception as error:  # none may pass through C
            print(f"{name.decode()}: {error!r}")
            return 1
        return 0

    return run


@dataclasses.dataclass(frozen=True)
class OnCpu(devices.Device):
    """A card to leangen, the CPU provider to ONNX Runtime."""

    provider = devices.CPU_PROVIDER

    def providers(self):
        return [devices.CPU_PROVIDER]


def pytest_configure(config):
    """Puts the card in; for the whole process."""
    folder = Path(os.environ["PTX_STAND_IN"])
    run = config.stash_run = _runs(ptx.read((folder / "cuda" / driver.PTX.format(90)).read_text()))
    ctypes.CDLL(driver.LIBRARY).fake_cuda_runs(run)
    driver.Card.__init__.__defaults__ = (0, folder / "cuda")
    choose, find, on_card = devices.choose, lowering.find, key_values.OnCard

    def chosen(asked="cpu"):
        return choose(asked) if asked == "cpu" else OnCpu("cuda", 0, "a stand-in")

    def found(*given, device="cpu", **more):
        if device == "cpu":
            return find(*given, **more)
        library, status = leangen_kernels.library, leangen_kernels.status
        leangen_kernels.library = lambda: folder / "operators.so"
        leangen_kernels.status = lambda: ("portable", "a stand-in")
        try:
            return find(*given, device=device, **more)
        finally:
            leangen_kernels.library, leangen_kernels.status = library, status

    devices.choose, lowering.find = chosen, found
    key_values.OnCard = lambda session, rows, capacity, role, memory: on_card(
        session, rows, capacity, role, ("cpu", memory[1])
    )
