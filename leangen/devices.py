"""Which device a model runs on: the CPU, or an NVIDIA card where all that it takes is there.

What a card is not used for, and why:

- CUDA graphs of ONNX Runtime (`enable_cuda_graph`). It refuses a session with control flow or a
  copy between devices, wants every input at one address in the card's memory, and replays what
  came from the host (GroupQueryAttention's total length) as it was at the capture, without a word.
  leangen's operators are made for it (lengths in the card's memory, nothing allocated after a first
  run), and `bench/gpu.py` times such graphs through the driver; here one comes when it has been
  seen to run.
- A diffusion loop's latents. Samplers are NumPy: an SD 1.5 latent of 64 kB goes up and down in each
  step, some tens of microseconds beside a UNet's ten milliseconds or more.
- Group norm. There is a kernel but no operator: a UNet runs on ONNX Runtime's own, whose
  convolutions are cuDNN's, and would need a layout of its own around it.
"""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, redirect_stdout
from dataclasses import dataclass
from functools import cache
from typing import Any

from leangen.errors import DependencyError, RequestError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
NO_PROVIDER = (
    "this onnxruntime has no CUDA provider: pip uninstall onnxruntime, then "
    "pip install 'leangen[gpu]'"
)
ALONE: dict[str, Any] = {"enable_fallback": 0}
"""For ONNX Runtime's sessions: else one that fails on a card goes on without it, in its Python."""
CUDA_PACKAGES = "pip install 'onnxruntime-gpu[cuda,cudnn]'"
NOT_YET = "written, but not yet run on a card"
"""What is to be said of everything here that needs one."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a session's graphs run."""

    kind: str
    """`cpu` or `cuda`, as `leangen.meters.select` takes it."""
    index: int
    reason: str
    memory_bytes: int = 0
    """A card's, in all."""

    @property
    def name(self) -> str:
        """As a receipt has it: `cpu`, `cuda:0`."""
        return self.kind if self.kind == "cpu" else f"{self.kind}:{self.index}"

    @property
    def provider(self) -> str:
        """ONNX Runtime's execution provider."""
        return CPU_PROVIDER if self.kind == "cpu" else CUDA_PROVIDER

    def providers(self) -> list[Any]:
        """What ONNX Runtime is given: the CPU too, for operators that the other lacks."""
        if self.kind == "cpu":
            return [CPU_PROVIDER]
        # Without this an arena doubles what it asks of the card each time.
        options = {"device_id": self.index, "arena_extend_strategy": "kSameAsRequested"}
        return [(CUDA_PROVIDER, options), CPU_PROVIDER]


CPU = Device("cpu", 0, "the default; --device auto takes an NVIDIA card where there is one")


# One node that hands on its input, as a model: made with `onnx`, which is slow to import.
_PROBE = (
    b'\x08\x08\x12\x00:7\n\x10\n\x01x\x12\x01y"\x08Identity\x12\x01gZ\x0f\n\x01x\x12\n\n\x08\x08\x01\x12'
    b"\x04\n\x02\x08\x01b\x0f\n\x01y\x12\n\n\x08\x08\x01\x12\x04\n\x02\x08\x01B\x04\n\x00\x10\r"
)


@cache
def lacks(index: int) -> str | None:
    """What ONNX Runtime's CUDA provider lacks to start on a card, and how to come by it.

    Loads CUDA and cuDNN, which it does not look for in their own packages.
    """
    import onnxruntime

    told = io.StringIO()
    with redirect_stdout(told):
        onnxruntime.preload_dlls()
    onnxruntime.set_default_logger_severity(3)  # errors; it warns of each provider that works
    if missing := re.search(r"Failed to load (?:\S*/)?(\S+):", told.getvalue()):
        return f"ONNX Runtime's CUDA provider lacks {missing[1]}: {CUDA_PACKAGES}"
    asked = [(CUDA_PROVIDER, {"device_id": index})]
    try:
        session = onnxruntime.InferenceSession(_PROBE, providers=asked, **ALONE)
        started = session.get_providers()
    except Exception as error:  # ORT raises many unrelated types from its C++ side
        said = re.search(r"CUDA failure [^;]*\w", str(error)) or [str(error).splitlines()[0]]
        return f"ONNX Runtime's CUDA provider does not start ({said[0]})"
    if CUDA_PROVIDER in started:
        return None
    return (
        "ONNX Runtime's CUDA provider does not start, its log says why: mostly the driver is older "
        f"than 580, or there is no CUDA 13 or cuDNN 9: {CUDA_PACKAGES}"
    )


def choose(
    asked: str = "cpu",
    *,
    providers: Sequence[str] | None = None,
    cards: Callable[[], Sequence[Any]] | None = None,
    lacks: Callable[[int], str | None] = lacks,
) -> Device:
    """The device for `cpu`, `cuda`, `cuda:N` or `auto`, and why.

    providers: what ONNX Runtime offers; cards: lists the driver's cards. None asks the machine.
    lacks: what is missing to use a card.

    Raises RequestError for another word or a card that is not there, DependencyError where
    something has to be installed for `cuda`.
    """
    if asked == "cpu":
        return CPU
    match = re.fullmatch(r"cuda(?::(\d+))?", asked)
    if asked != "auto" and match is None:
        raise RequestError(f"device is {asked!r}, expected cpu, cuda, cuda:N or auto")
    index = int(match[1] or 0) if match else 0
    found, missing = _cards(providers, cards)
    if missing is not None:
        if asked == "auto":
            return Device("cpu", 0, f"no card to use: {missing}")
        raise DependencyError(f"--device {asked}: {missing}")
    if index >= len(found):
        shown = ", ".join(f"cuda:{card.index} {card.name}" for card in found) or "none"
        if asked == "auto":
            return Device("cpu", 0, "the NVIDIA driver lists no card")
        raise RequestError(f"--device {asked}: there is no such card; the driver lists {shown}")
    if (missing := lacks(index)) is not None:
        if asked == "auto":
            return Device("cpu", 0, f"no card to use: {missing}")
        raise DependencyError(f"--device {asked}: {missing}")
    card = found[index]
    how = "asked for" if match else "the first card that the driver lists"
    return Device("cuda", index, f"{card.name}, {how}; {NOT_YET}", card.memory_bytes)


def _cards(
    providers: Sequence[str] | None, cards: Callable[[], Sequence[Any]] | None
) -> tuple[Sequence[Any], str | None]:
    """The driver's cards, or what is missing and how to come by it."""
    from leangen_kernels.cuda import driver

    if providers is None:
        import onnxruntime

        providers = onnxruntime.get_available_providers()
    if CUDA_PROVIDER not in providers:
        return (), NO_PROVIDER
    try:
        return (cards or driver.devices)(), None
    except driver.CudaError as error:
        return (), f"{error}; install the NVIDIA driver (580 or newer for CUDA 13), " + (
            "and in a container pass the card in"
        )


def out_of_memory(said: str) -> bool:
    """Whether an error of ONNX Runtime's, or of our operators in it, says that the card is full."""
    return _FULL.search(said) is not None


# Its arena, with and without a limit; the CUDA runtime and our operators; cuBLAS and cuDNN.
_FULL = re.compile(
    r"Failed to allocate memory|smaller than requested|out of memory|CUDA failure 2\b"
    r"|ALLOC\w*_FAILED"
)


@dataclass(frozen=True, slots=True)
class Load:
    """What a model brings onto a device."""

    name: str
    size_bytes: int
    bits: float
    """Of a weight."""

    def too_much(self, device: Device, said: str) -> str:
        """What to say when a card has no room for it, or for a request to it; `said` by ORT."""
        room = device.memory_bytes * _FOR_WEIGHTS
        asked = re.search(r"buffer of size (\d+)", said)
        more = f", and {_gb(int(asked[1]))} more were asked for" if asked else ""
        if self.size_bytes > room:
            remedy = "a scheme of fewer bits"
            if (most := int(self.bits * room / self.size_bytes)) >= 2:
                remedy += f" (about {most} a weight, now {self.bits:.3g}, leave room to work in)"
        else:
            remedy = "a shorter prompt or context, a smaller batch or picture, other programs ended"
        return (
            f"{device.name} is out of memory: it has {_gb(device.memory_bytes)} in all, "
            f"{self.name} is {_gb(self.size_bytes)}{more}; what helps: {remedy}, or --device cpu"
        )


_FOR_WEIGHTS = 0.8
"""Of a card's memory: the rest is for its context, activations, keys and values."""


def _gb(count: int) -> str:
    return f"{count / 1e9:.{1 if count >= 1e9 else 3}f} GB"


class OnCard:
    """A session of ONNX Runtime's whose runs may find the card full; `told` then says so."""

    def __init__(self, graph: Any, told: Callable[[], AbstractContextManager[None]]) -> None:
        self._graph, self._told = graph, told

    def run(self, *given: Any, **options: Any) -> Any:
        """As the session's."""
        with self._told():
            return self._graph.run(*given, **options)

    def run_with_iobinding(self, *given: Any, **options: Any) -> None:
        """As the session's."""
        with self._told():
            self._graph.run_with_iobinding(*given, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._graph, name)
