"""GPUs: NVML without a counter, with several cards and with MIG; amdgpu cards and APUs."""

from __future__ import annotations

from types import SimpleNamespace

import boards_at
import pytest

from leangen import clock, meters
from leangen.meters import MeterFault, Selection, Unavailable, amdgpu, nvml


class FakeNvml:
    """The part of pynvml in use, over dicts; a key that is missing is Not Supported."""

    class NVMLError(Exception):
        pass

    def __init__(self, *cards):
        self.cards = list(cards)

    def nvmlInit(self):
        pass

    def nvmlDeviceGetCount(self):
        return len(self.cards)

    def nvmlDeviceGetHandleByIndex(self, index):
        return index

    def _get(self, index, key):
        if key not in self.cards[index]:
            raise self.NVMLError("Not Supported")
        return self.cards[index][key]

    def nvmlDeviceGetName(self, index):
        return self._get(index, "name")

    def nvmlDeviceGetUUID(self, index):
        return self._get(index, "uuid")

    def nvmlDeviceGetTotalEnergyConsumption(self, index):
        return self._get(index, "energy_mj")

    def nvmlDeviceGetPowerUsage(self, index):
        return self._get(index, "usage_mw")

    def nvmlDeviceGetMigMode(self, index):
        return self._get(index, "mig")

    def nvmlDeviceGetFieldValues(self, index, fields):
        assert fields == [nvml.POWER_INSTANT]
        power_mw = self.cards[index].get("instant_mw")
        value = SimpleNamespace(uiVal=power_mw or 0)
        return [SimpleNamespace(nvmlReturn=0 if power_mw is not None else 3, value=value)]


@pytest.fixture(autouse=True)
def no_cuda_variables(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.delenv("CUDA_DEVICE_ORDER", raising=False)


def test_the_counter_is_preferred_then_instant_power_then_the_mean():
    fake = FakeNvml(
        {"name": "A", "energy_mj": 5, "instant_mw": 1, "usage_mw": 1},
        {"name": "B", "instant_mw": 70_000, "usage_mw": 1},
        {"name": "C", "usage_mw": 30_000},
        {"name": "D"},
    )
    counter, instant, mean, nothing = nvml.open(nvml=fake)
    assert (counter.source, instant.source, mean.source) == ("measured", "integrated", "integrated")
    assert "POWER_INSTANT" in instant.note
    assert mean.tick.seconds == 1.0
    assert isinstance(nothing, Unavailable)
    assert "neither energy nor power: Not Supported" in nothing.reason
    window = meters.begin(Selection(meters=(instant,), reason=None))
    clock.sleep(0.1)
    [closed] = meters.end(window)
    assert closed.energy_uj == pytest.approx(70e6 * window.tracks[0].elapsed_s, rel=1e-6)


def test_a_lost_gpu_is_a_fault():
    fake = FakeNvml({"name": "B", "instant_mw": 70_000})
    [meter] = nvml.open(nvml=fake)
    fake.cards[0].clear()
    with pytest.raises(MeterFault, match="vanished"):
        meter.read()


def test_mig_is_the_whole_gpu_and_says_so():
    [meter] = nvml.open(nvml=FakeNvml({"name": "H100", "energy_mj": 1, "mig": (1, 1)}))
    assert "the whole GPU, all its slices" in meter.note
    [meter] = nvml.open(nvml=FakeNvml({"name": "H100", "energy_mj": 1, "mig": (0, 0)}))
    assert meter.note == "H100"


def cards(*names):
    return FakeNvml(
        *({"name": n, "energy_mj": 1, "uuid": f"GPU-{i}f"} for i, n in enumerate(names))
    )


@pytest.mark.parametrize(
    ("names", "visible", "order", "in_total"),
    [
        ("AA", None, None, [0, 1]),
        ("AA", "1", None, [1]),
        ("AA", "", None, []),
        ("AB", "1", None, [0, 1]),  # CUDA may count them the other way round
        ("AB", "1", "PCI_BUS_ID", [1]),
        ("AB", "GPU-0f", None, [0]),
        ("AA", "MIG-12-34", None, [0, 1]),
    ],
)
def test_only_gpus_that_this_process_may_use(monkeypatch, names, visible, order, in_total):
    if visible is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    if order:
        monkeypatch.setenv("CUDA_DEVICE_ORDER", order)
    found = nvml.open(nvml=cards(*names))
    assert [i for i, meter in enumerate(found) if meter.in_total] == in_total


def with_gpu(monkeypatch, fake):
    """Let `select` find the fake cards beside the server's packages."""
    real = meters.open_sensor
    monkeypatch.setattr(
        meters,
        "open_sensor",
        lambda name, root: nvml.open(nvml=fake) if name == "nvml" else real(name, root),
    )


def test_counters_of_packages_and_gpus_add_up(monkeypatch):
    with_gpu(monkeypatch, cards("A"))
    server = boards_at.BOARDS / "server"
    scope = meters.select(server, device="cuda").scope
    assert scope == ("package-0", "dram-0", "package-1", "dram-1", "gpu-0")
    assert "gpu-0" not in meters.select(server, device="cpu").scope


def test_a_sampled_gpu_stands_alone_and_says_what_is_left_out(monkeypatch):
    with_gpu(monkeypatch, FakeNvml({"name": "B", "instant_mw": 70_000}))
    selection = meters.select(boards_at.BOARDS / "server", device="cuda")
    assert selection.scope == ("gpu-0",)
    assert "not covered: rapl:package-0: it is measured" in selection.reason


def test_a_jetson_gpu_is_covered_by_the_boards_input(monkeypatch):
    with_gpu(monkeypatch, FakeNvml({"name": "Orin (nvgpu)"}))
    selection = meters.select(boards_at.BOARDS / "jetson-orin", device="cuda")
    assert selection.scope == ("VDD_IN",)


def test_amdgpu_prefers_a_counter_and_tells_cards_from_apus(tmp_path):
    root = boards_at.copy("amd-desktop", tmp_path)
    card, apu = amdgpu.open(root)
    assert (card.scope, apu.scope) == ("gpu-0", "socket-1")
    assert (card.tick.seconds, card.source) == (1.0, "integrated")
    boards_at.put(root, "sys/class/hwmon/hwmon2/power1_input", 30_000_000)
    assert amdgpu.open(root)[0].tick.seconds == 0.1
    boards_at.put(root, "sys/class/hwmon/hwmon2/energy1_input", 123)
    card = amdgpu.open(root)[0]
    assert card.source == "measured"
    assert card.read().count == 123
    (root / "sys/class/hwmon/hwmon2/energy1_input").unlink()
    with pytest.raises(MeterFault, match="vanished"):
        card.read()


def test_an_amdgpu_without_power_says_so(tmp_path):
    boards_at.put(tmp_path, "sys/class/hwmon/hwmon0/name", "amdgpu")
    [missing] = amdgpu.open(tmp_path)
    assert missing.reason == "this GPU shows no power or energy"
