"""Trees that stand in for /, with powercap files as published kernels lay them out."""

from __future__ import annotations

from pathlib import Path

RANGE_UJ = 262_143_328_850
"""The usual `max_energy_range_uj` of Intel packages."""

LAPTOP = {
    "intel-rapl:0": ("package-0", 1_000_000_000),
    "intel-rapl:0:0": ("core", 600_000_000),
    "intel-rapl:0:1": ("uncore", 50_000_000),
    "intel-rapl:0:2": ("dram", 200_000_000),
    "intel-rapl:1": ("psys", 3_000_000_000),
}
SERVER = {
    "intel-rapl:0": ("package-0", 4_000_000_000),
    "intel-rapl:0:0": ("dram", 700_000_000),
    "intel-rapl:1": ("package-1", 5_000_000_000),
    "intel-rapl:1:0": ("dram", 800_000_000),
    "intel-rapl-mmio:0": ("package-0", 4_000_000_100),
    "intel-rapl-mmio:0:0": ("dram", 700_000_100),
    "intel-rapl-mmio:1": ("package-1", 5_000_000_100),
}


def make(root: Path, zones: dict[str, tuple[str, int]], vendor: str = "GenuineIntel") -> Path:
    """A tree with these zones: file name to (domain name, energy in microjoules)."""
    for zone, (name, energy_uj) in zones.items():
        folder = root / "sys/class/powercap" / zone
        folder.mkdir(parents=True)
        (folder / "name").write_text(f"{name}\n")
        (folder / "max_energy_range_uj").write_text(f"{RANGE_UJ}\n")
        (folder / "energy_uj").write_text(f"{energy_uj}\n")
    (root / "sys/class/powercap/intel-rapl").mkdir()
    (root / "proc").mkdir()
    (root / "proc/cpuinfo").write_text(f"processor\t: 0\nvendor_id\t: {vendor}\n")
    return root


def counter(root: Path, zone: str) -> Path:
    """The counter file of a zone."""
    return root / "sys/class/powercap" / zone / "energy_uj"


def spend(root: Path, zone: str, energy_uj: int) -> None:
    """Advance a counter, wrapping as the hardware does."""
    file = counter(root, zone)
    file.write_text(f"{(int(file.read_text()) + energy_uj) % RANGE_UJ}\n")
