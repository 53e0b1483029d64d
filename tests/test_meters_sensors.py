"""What each sensor finds in a tree, what it says of what it cannot read, and what may be summed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import fake_powercap
import pytest

from leangen import meters
from leangen.errors import RequestError
from leangen.meters import Meter, MeterFault, Unavailable, estimate, nvml, rapl


def by_scope(entries):
    return {entry.scope: entry for entry in entries if isinstance(entry, Meter)}


def test_laptop_domains_are_found_and_only_disjoint_ones_summed(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    found = by_scope(rapl.open(root))
    assert set(found) == {"package-0", "core-0", "uncore-0", "dram-0", "psys"}
    selection = meters.select(root)
    assert selection.scope == ("package-0", "dram-0")
    assert selection.source == "measured"
    assert selection.reason is None
    assert selection.baseline is None  # a counter's idle power has to be measured
    assert found["package-0"].read().count == 1_000_000_000
    assert found["package-0"].wraps_at == fake_powercap.RANGE_UJ
    for inside in ("core-0", "uncore-0", "psys"):
        assert found[inside].note


def test_dual_socket_counts_each_domain_once_and_prefers_msr(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.SERVER)
    selection = meters.select(root)
    assert selection.scope == ("package-0", "dram-0", "package-1", "dram-1")
    assert [meter.read().count for meter in selection.meters] == [
        4_000_000_000,
        700_000_000,
        5_000_000_000,
        800_000_000,
    ]


def test_an_unreadable_msr_zone_gives_way_to_its_mmio_double(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.SERVER)
    fake_powercap.counter(root, "intel-rapl:0").unlink()
    found = by_scope(rapl.open(root))
    assert found["package-0"].read().count == 4_000_000_100


def test_psys_of_two_sockets_stay_apart(tmp_path):
    zones = {"intel-rapl:0": ("package-0", 5), "intel-rapl:1": ("psys", 6)}
    root = fake_powercap.make(tmp_path, {**zones, "intel-rapl:3": ("psys", 7)})
    found = by_scope(rapl.open(root))
    assert set(found) == {"package-0", "psys", "psys-3"}


def test_class_uncertainty_depends_on_vendor_and_domain(tmp_path):
    intel = by_scope(rapl.open(fake_powercap.make(tmp_path / "i", fake_powercap.LAPTOP)))
    amd = by_scope(
        rapl.open(fake_powercap.make(tmp_path / "a", fake_powercap.LAPTOP, "AuthenticAMD"))
    )
    assert intel["package-0"].u_systematic < amd["package-0"].u_systematic
    assert intel["dram-0"].u_systematic > intel["package-0"].u_systematic


def test_a_dead_counter_is_not_a_sensor(tmp_path):
    zones = {**fake_powercap.LAPTOP, "intel-rapl:0:2": ("dram", 0)}
    root = fake_powercap.make(tmp_path, zones)
    selection = meters.select(root)
    assert selection.scope == ("package-0",)
    assert "rapl:dram-0: its counter stands at 0" in selection.reason


def test_memory_alone_is_no_total(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    fake_powercap.counter(root, "intel-rapl:0").write_text("busy\n")
    selection = meters.select(root)
    assert selection.source == "estimated"
    assert "rapl:package-0" in selection.reason


def test_one_missing_socket_is_named(tmp_path):
    root = fake_powercap.make(
        tmp_path, {k: v for k, v in fake_powercap.SERVER.items() if "mm" not in k}
    )
    counter = fake_powercap.counter(root, "intel-rapl:1")
    counter.unlink()
    counter.mkdir()  # reading it fails, for root too
    selection = meters.select(root)
    assert selection.scope == ("package-0", "dram-0", "dram-1")
    assert selection.reason.startswith("not covered: rapl:package-1: energy_uj: Is a directory")


@pytest.mark.parametrize("text", ["", "12.5", "-3", "1_000", "0x10", "nan"])
def test_garbage_is_a_fault_not_a_number(tmp_path, text):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    meter = by_scope(rapl.open(root))["package-0"]
    fake_powercap.counter(root, "intel-rapl:0").write_text(text)
    with pytest.raises(MeterFault) as caught:
        meter.read()
    assert caught.value.fault == "garbage"


def test_no_powercap_at_all_falls_back_to_the_labelled_estimate(tmp_path):
    [missing] = rapl.open(tmp_path)
    assert isinstance(missing, Unavailable)
    assert "no /sys/class/powercap" in missing.reason
    assert "modprobe" in missing.remedy
    selection = meters.select(tmp_path)
    assert selection.source == "estimated"
    assert selection.reason.startswith("estimated, not measured:")
    assert "Cloud Carbon Footprint" in selection.reason
    assert "60%" in selection.reason


PERMISSION_PROBE = """
import json, os, sys
from pathlib import Path
from leangen import meters
for sensor in meters.SENSORS: meters.open_sensor(sensor, Path("/nowhere"))  # import them all
if os.geteuid() == 0:
    os.setgroups([]); os.setresgid(65534, 65534, 65534); os.setresuid(65534, 65534, 65534)
root = Path(sys.argv[1])
selection = meters.select(root)
print(json.dumps([selection.source, selection.reason] +
                 [[u.sensor, u.reason, u.remedy] for u in selection.unavailable]))
"""


def test_permission_denied_names_the_cve_and_the_udev_rule():
    # Root reads any file, so the child gives root up first; pytest's own tmp_path is private.
    with tempfile.TemporaryDirectory() as folder:
        os.chmod(folder, 0o755)
        root = fake_powercap.make(Path(folder), fake_powercap.LAPTOP)
        for zone in fake_powercap.LAPTOP:
            fake_powercap.counter(root, zone).chmod(0o000)
        child = subprocess.run(
            [sys.executable, "-c", PERMISSION_PROBE, folder],
            env={**os.environ, "PYTHONPATH": str(Path(meters.__file__).parents[2])},
            capture_output=True,
            text=True,
        )
    assert child.returncode == 0, child.stderr
    source, reason, *missing = json.loads(child.stdout)
    assert source == "estimated"
    assert "rapl:package-0: energy_uj: Permission denied" in reason
    assert "core-0" not in reason  # it would not have joined the total
    sensor, why, remedy = missing[0]
    assert (sensor, why) == ("rapl:package-0", "energy_uj: Permission denied")
    assert "CVE-2020-8694" in remedy
    assert 'SUBSYSTEM=="powercap"' in remedy
    assert "chmod a+r" in remedy


class FakeNvml:
    """The part of pynvml that a meter uses, over a list of cards: (name, millijoules or None)."""

    class NVMLError(Exception):
        pass

    def __init__(self, cards, driver=True):
        self.cards = cards
        self.driver = driver

    def nvmlInit(self):
        if not self.driver:
            raise self.NVMLError("NVML Shared Library Not Found")

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def nvmlDeviceGetName(self, index):
        return self.cards[index][0]

    def nvmlDeviceGetTotalEnergyConsumption(self, index):
        energy_mj = self.cards[index][1]
        if energy_mj is None:
            raise self.NVMLError("Not Supported")
        return energy_mj


def test_nvml_has_a_meter_for_every_card_that_counts():
    fake = FakeNvml([("NVIDIA H100 80GB HBM3", 123_456), (b"Tesla V100", 9), ("Tesla P4", None)])
    first, second, third = nvml.open(nvml=fake)
    assert (first.name, first.scope, first.coverage) == ("nvml:0", "gpu-0", 0.25)
    assert first.read().count == 123_456
    assert first.read().unit == "mJ"
    assert second.note == "Tesla V100"
    assert second.coverage is None
    assert isinstance(third, Unavailable)
    assert "Not Supported" in third.reason
    fake.cards[0] = ("NVIDIA H100 80GB HBM3", None)
    with pytest.raises(MeterFault, match="vanished"):
        first.read()


def test_nvml_without_driver_or_cards_says_what_to_do():
    [missing] = nvml.open(nvml=FakeNvml([], driver=False))
    assert "Not Found" in missing.reason
    assert "driver" in missing.remedy
    [none] = nvml.open(nvml=FakeNvml([]))
    assert "no GPU" in none.reason


def test_nvml_does_not_look_at_this_machine_for_another_root(tmp_path):
    [missing] = nvml.open(tmp_path)
    assert isinstance(missing, Unavailable)


def test_nvml_without_its_library_names_the_extra():
    code = (
        "import sys; sys.modules['pynvml'] = None\n"
        "from leangen.meters import nvml; print(nvml.open()[0].remedy)"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert child.stdout.strip() == "pip install 'leangen[gpu]'"


def test_estimate_rises_with_wall_and_cpu_time(tmp_path):
    [meter] = estimate.open(tmp_path)
    first = meter.read()
    total = sum(range(200_000))
    second = meter.read()
    assert total and second.count > first.count
    wall_uj = meter.idle_power_w * (second.t_ns - first.t_ns) / 1e3
    assert second.count - first.count >= int(wall_uj)


def test_estimate_honours_the_cgroup_quota(tmp_path):
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text("0::/box\n")
    (tmp_path / "sys/fs/cgroup/box").mkdir(parents=True)
    (tmp_path / "sys/fs/cgroup/box/cpu.max").write_text("50000 100000\n")
    [meter] = estimate.open(tmp_path)
    assert meter.idle_power_w == pytest.approx(0.5 * estimate.IDLE_W_PER_CPU)


def test_every_sensor_answers_and_states_its_class(tmp_path):
    roots = [tmp_path, fake_powercap.make(tmp_path / "laptop", fake_powercap.LAPTOP)]
    for name in meters.SENSORS:
        for root in roots:
            entries = meters.open_sensor(name, root)
            assert entries
            for entry in entries:
                if isinstance(entry, Unavailable):
                    assert entry.reason
                else:
                    assert entry.name.startswith(name)
                    assert 0 < entry.u_systematic < 1
                    assert entry.tick.seconds > 0
                    assert entry.read().unit == entry.unit


def test_a_counter_and_an_estimate_never_form_one_total(tmp_path):
    for root in (tmp_path, fake_powercap.make(tmp_path / "server", fake_powercap.SERVER)):
        for device in ("cpu", "cuda"):
            sources = {meter.source for meter in meters.select(root, device=device).meters}
            assert len(sources) == 1


def test_unknown_device_is_refused(tmp_path):
    with pytest.raises(RequestError, match="device is 'tpu', expected one of cpu, cuda"):
        meters.select(tmp_path, device="tpu")


def test_describe_says_what_is_in_the_total_and_why_not(tmp_path):
    root = fake_powercap.make(tmp_path, fake_powercap.LAPTOP)
    rows = {row["sensor"]: row for row in meters.describe(root)}
    assert rows["rapl:package-0"]["status"] == "in total"
    assert rows["rapl:core-0"]["status"] == "available"
    assert "inside its package" in rows["rapl:core-0"]["reason"]
    assert rows["nvml"]["status"] == "unavailable"
    assert rows["estimate:cpu-time"]["status"] == "available"
    assert rows["estimate:cpu-time"]["reason"].startswith("not used")
    assert "probing saw it move 0 times" in rows["rapl:package-0"]["tick_how"]
    json.dumps(list(rows.values()))


def test_describe_without_any_counter(tmp_path):
    rows = {row["sensor"]: row for row in meters.describe(tmp_path)}
    assert rows["estimate:cpu-time"]["status"] == "in total"
    assert rows["rapl"]["remedy"]
