"""NVIDIA GPUs, through NVML: the energy counter, or power sampled where there is none.

`nvmlDeviceGetTotalEnergyConsumption` (Volta and newer): millijoules of the whole board since the
driver was loaded, 64 bits, so it never wraps; it restarts at 0 when the driver does (fault
`reset`). Tick: about 100 ms on most cards, 10 ms on some; `leangen meters` probes it.

Without a counter: the field POWER_INSTANT sampled 50 times a second while a window is open, or
else `nvmlDeviceGetPowerUsage`, which on most cards since Ampere is the mean of the last second.

Several GPUs: those that CUDA_VISIBLE_DEVICES leaves to this process form the total (UUIDs; numbers
only where CUDA counts as NVML does: CUDA_DEVICE_ORDER=PCI_BUS_ID, or cards all alike). A MIG slice
has no energy of its own: the figure is the whole GPU's, all its slices, and the note says so.

Class uncertainty, k=2, type B: 10%. Against an external meter the sensors' gain is off by a few
percent, a different figure for each card, and on A100 and H100 only about 25% of the time is
sampled at all (Yang et al., "Part-time power measurements: nvidia-smi's lack of attention",
arXiv 2312.02741). What a short burst does in the unsampled time is not in this figure; `coverage`
in the receipt says so.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from importlib import import_module
from pathlib import Path
from typing import Any

from leangen import clock
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.meters.sampled import PowerSampler
from leangen.records import Reading

TICK = Tick(0.1, "documented: the counter moves about every 100 ms")
POWER_INSTANT = 186
"""NVML_FI_DEV_POWER_INSTANT, milliwatts."""
PERIOD_S = 0.02
PART_TIME = {"A100": 0.25, "H100": 0.25}
"""Sampled share of the time by a word of the card's name (arXiv 2312.02741)."""

ERROR_GPU_IS_LOST = 15
"""nvml.h: it fell off the bus."""


def open(root: Path = Path("/"), *, nvml: Any = None) -> list[Meter | Unavailable]:
    """A meter for every GPU, or why there is none.

    `nvml` is the module to talk to: pynvml (of `nvidia-ml-py`) when None, imported here. A `root`
    other than / is another machine's tree, which the library cannot look into.
    """
    if nvml is None:
        if root != Path("/"):
            return [Unavailable("nvml", f"NVML sees only the running system, not {root}", "")]
        try:
            nvml = import_module("pynvml")
        except ModuleNotFoundError as error:
            if error.name != "pynvml":
                raise
            return [
                Unavailable("nvml", "nvidia-ml-py is not installed", "pip install 'leangen[gpu]'")
            ]
    try:
        nvml.nvmlInit()
        count = nvml.nvmlDeviceGetCount()
    except nvml.NVMLError as error:
        remedy = "install the NVIDIA driver; in a container pass the GPU in"
        return [Unavailable("nvml", f"NVML does not start: {error}", remedy)]
    if count == 0:
        return [Unavailable("nvml", "the NVIDIA driver lists no GPU", "")]
    gpus = [_Gpu(nvml, index) for index in range(count)]
    hidden = _hidden(gpus, os.environ.get("CUDA_VISIBLE_DEVICES"))
    return [_open_gpu(gpu, hidden=gpu.index in hidden) for gpu in gpus]


class _Gpu:
    """One card, with the questions that NVML may refuse answered by None."""

    def __init__(self, nvml: Any, index: int) -> None:
        self.nvml = nvml
        self.index = index
        self.refusal: str | None = None
        self.handle: Any = None
        try:
            self.handle = nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError as error:
            self.refusal = str(error)
        self.card = _decoded(self.ask("nvmlDeviceGetName")) or "GPU"
        self.uuid = _decoded(self.ask("nvmlDeviceGetUUID"))

    def ask(self, function: str, *arguments: Any) -> Any:
        """What the function says of this card; None when the card or this NVML lacks it."""
        if self.handle is None or not hasattr(self.nvml, function):
            return None
        try:
            return getattr(self.nvml, function)(self.handle, *arguments)
        except self.nvml.NVMLError as error:
            self.refusal = str(error)
            return None

    def instant_w(self) -> float | None:
        """POWER_INSTANT in watts."""
        values = self.ask("nvmlDeviceGetFieldValues", [POWER_INSTANT])
        if not values or values[0].nvmlReturn != 0:
            return None
        return int(values[0].value.uiVal) / 1e3

    def usage_w(self) -> float | None:
        """The power that the driver shows, on newer cards the mean of a second."""
        power_mw = self.ask("nvmlDeviceGetPowerUsage")
        return None if power_mw is None else power_mw / 1e3


def _hidden(gpus: Sequence[_Gpu], visible: str | None) -> set[int]:
    """Indices of the cards that this process surely cannot use."""
    if visible is None:
        return set()
    names = [name.strip() for name in visible.split(",") if name.strip()]
    if any(name.startswith("MIG-") for name in names):
        return set()  # which card a slice is of takes asking each: all may be in use
    if all(name.isdecimal() for name in names):
        alike = len({gpu.card for gpu in gpus}) == 1
        if alike or os.environ.get("CUDA_DEVICE_ORDER") == "PCI_BUS_ID":
            return {gpu.index for gpu in gpus} - {int(name) for name in names}
        return set()
    return {
        gpu.index
        for gpu in gpus
        if gpu.uuid and not any(gpu.uuid.startswith(name) for name in names)
    }


def _open_gpu(gpu: _Gpu, *, hidden: bool) -> Meter | Unavailable:
    name = f"nvml:{gpu.index}"
    tick, sampler = TICK, None
    notes = [gpu.card]
    if gpu.ask("nvmlDeviceGetTotalEnergyConsumption") is None:
        if gpu.instant_w() is not None:
            tick = Tick(0.1, "documented: power is renewed about every 25 to 100 ms")
            sampler = PowerSampler(_watts(gpu.instant_w), PERIOD_S)
            notes.append("no energy counter: POWER_INSTANT is sampled")
        elif gpu.usage_w() is not None:
            tick = Tick(1.0, "documented: mean of the last second since Ampere")
            sampler = PowerSampler(_watts(gpu.usage_w), PERIOD_S)
            notes.append("no energy counter: the mean power of a second is sampled")
        else:
            reason = f"neither energy nor power: {gpu.refusal}"
            remedy = (
                "energy needs Volta or newer, and the whole GPU visible, not a MIG slice alone; on "
                "a Jetson the INA3221 rails measure the GPU"
            )
            return Unavailable(name, reason, remedy, in_total=not hidden)
    mig = gpu.ask("nvmlDeviceGetMigMode")
    if mig is not None and mig[0]:
        notes.append("MIG is on: energy of the whole GPU, all its slices")
    if hidden:
        notes.append("CUDA_VISIBLE_DEVICES leaves it out")
    return Meter(
        name=name,
        source="integrated" if sampler else "measured",
        scope=f"gpu-{gpu.index}",
        in_total=not hidden,
        unit="uJ" if sampler else "mJ",
        tick=tick,
        u_systematic=0.10,
        max_power_w=3000.0,
        wraps_at=None,
        coverage=next((part for word, part in PART_TIME.items() if word in gpu.card), None),
        read=sampler.read if sampler else _reader(gpu.nvml, gpu.handle),
        note="; ".join(notes),
        sampler=sampler,
        read_power_w=None if sampler or gpu.instant_w() is None else _watts(gpu.instant_w),
    )


def _watts(ask: Callable[[], float | None]) -> Callable[[], float]:
    def read() -> float:
        power_w = ask()
        if power_w is None:
            raise MeterFault("vanished", "NVML shows no power any more")
        return power_w

    return read


def _decoded(text: Any) -> str:
    return text.decode() if isinstance(text, bytes) else str(text or "")


def _reader(nvml: Any, handle: Any) -> Callable[[], Reading]:
    def read() -> Reading:
        try:
            count = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            lost = getattr(error, "value", None) == ERROR_GPU_IS_LOST
            raise MeterFault("lost" if lost else "vanished", str(error)) from None
        t_ns = clock.monotonic_ns()
        if not isinstance(count, int) or count < 0:
            raise MeterFault("garbage", f"{count!r} is not a count")
        return Reading(count, "mJ", t_ns)

    return read
