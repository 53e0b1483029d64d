"""Which device a model runs on: the CPU, or an NVIDIA card where all that it takes is there."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from leangen.errors import DependencyError, RequestError

CPU_PROVIDER, CUDA_PROVIDER = "CPUExecutionProvider", "CUDAExecutionProvider"
NO_PROVIDER = (
    "this onnxruntime has no CUDA provider: pip uninstall onnxruntime, then "
    "pip install 'leangen[gpu]'"
)
NOT_YET = "written, but not yet run on a card"
"""What is to be said of everything here that needs one."""


@dataclass(frozen=True, slots=True)
class Device:
    """Where a session's graphs run."""

    kind: str
    """`cpu` or `cuda`, as `leangen.meters.select` takes it."""
    index: int
    reason: str

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


def choose(
    asked: str = "cpu",
    *,
    providers: Sequence[str] | None = None,
    cards: Callable[[], Sequence[Any]] | None = None,
) -> Device:
    """The device for `cpu`, `cuda`, `cuda:N` or `auto`, and why.

    providers: what ONNX Runtime offers; cards: lists the driver's cards. None asks the machine.

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
    card = found[index]
    how = "asked for" if match else "the first card that the driver lists"
    return Device("cuda", index, f"{card.name}, {how}; {NOT_YET}")


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


def out_of_memory(message: str) -> bool:
    """Whether an error of ONNX Runtime's says that the card is full."""
    return bool(re.search(r"out of memory|CUDA failure 2\b|Failed to allocate memory", message))


def too_large(name: str, device: Device, path: Path) -> str:
    """What to say when a card has no room for a model."""
    size = sum(part.stat().st_size for part in path.parent.glob(f"{path.stem}*"))
    return (
        f"{name} does not fit into the memory of {device.name}: its weights alone are "
        f"{size / 1e9:.1f} GB; a scheme of fewer bits (int8 a half, int4 a quarter of fp16's), a "
        "card with more, or --device cpu"
    )
