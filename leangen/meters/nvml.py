"""The total-energy counter of NVIDIA GPUs (Volta and newer), through NVML.

`nvmlDeviceGetTotalEnergyConsumption`: millijoules of the whole board since the driver was loaded,
64 bits, so it never wraps; it restarts at 0 when the driver does (fault `reset`).

Tick: about 100 ms on most cards, 10 ms on some; `leangen meters` probes it.

Class uncertainty, k=2, type B: 10%. Against an external meter the sensors' gain is off by a few
percent, a different figure for each card, and on A100 and H100 only about 25% of the time is
sampled at all (Yang et al., "Part-time power measurements: nvidia-smi's lack of attention",
arXiv 2312.02741). What a short burst does in the unsampled time is not in this figure; `coverage`
in the receipt says so.
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from leangen import clock
from leangen.meters.meter import Meter, MeterFault, Tick, Unavailable
from leangen.records import Reading

TICK = Tick(0.1, "documented: the counter moves about every 100 ms")
PART_TIME = {"A100": 0.25, "H100": 0.25}
"""Sampled share of the time by a word of the card's name (arXiv 2312.02741)."""


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
    return [_open_gpu(nvml, index) for index in range(count)]


def _open_gpu(nvml: Any, index: int) -> Meter | Unavailable:
    name = f"nvml:{index}"
    try:
        handle = nvml.nvmlDeviceGetHandleByIndex(index)
        card = nvml.nvmlDeviceGetName(handle)
        nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
    except nvml.NVMLError as error:
        remedy = "energy counters need Volta or newer and a whole GPU, not a MIG slice"
        return Unavailable(name, f"no energy counter: {error}", remedy)
    card = card.decode() if isinstance(card, bytes) else str(card)
    coverage = next((share for word, share in PART_TIME.items() if word in card), None)
    return Meter(
        name=name,
        source="measured",
        scope=f"gpu-{index}",
        in_total=True,
        unit="mJ",
        tick=TICK,
        u_systematic=0.10,
        max_power_w=3000.0,
        wraps_at=None,
        coverage=coverage,
        read=_reader(nvml, handle),
        note=card,
    )


def _reader(nvml: Any, handle: Any) -> Callable[[], Reading]:
    def read() -> Reading:
        try:
            count = nvml.nvmlDeviceGetTotalEnergyConsumption(handle)
        except nvml.NVMLError as error:
            raise MeterFault("vanished", str(error)) from None
        t_ns = clock.monotonic_ns()
        if not isinstance(count, int) or count < 0:
            raise MeterFault("garbage", f"{count!r} is not a count")
        return Reading(count, "mJ", t_ns)

    return read
