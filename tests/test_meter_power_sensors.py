"""INA3221, the Pi's PMIC, other hwmon drivers, batteries and Apple's counters."""

from __future__ import annotations

import boards_at
import pytest

from leangen.meters import Meter, MeterFault, Unavailable, apple, battery, hwmon, ina3221, pmic


def test_rails_inside_the_input_are_never_summed_with_it():
    found = {meter.scope: meter for meter in ina3221.open(boards_at.BOARDS / "jetson-orin")}
    assert set(found) == {"VDD_IN", "VDD_CPU_GPU_CV", "VDD_SOC"}
    assert [scope for scope, meter in found.items() if meter.in_total] == ["VDD_IN"]
    assert found["VDD_SOC"].note == "fed from VDD_IN, counted there"
    assert found["VDD_IN"].tick.seconds == 0.007  # its update_interval


def chip(root, number, rails):
    folder = f"sys/class/hwmon/hwmon{number}"
    boards_at.put(root, f"{folder}/name", "ina3221")
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        boards_at.put(root, f"{folder}/in{channel}_label", label)
        boards_at.put(root, f"{folder}/in{channel}_input", millivolts)
        boards_at.put(root, f"{folder}/curr{channel}_input", milliamperes)


AGX_ORIN = [
    [("VDD_GPU_SOC", 843, 6170), ("VDD_CPU_CV", 780, 3437), ("VIN_SYS_5V0", 4968, 953)],
    [("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 1800, 341)],
]


def test_an_agx_orin_adds_its_three_input_rails(tmp_path):
    for number, rails in enumerate(AGX_ORIN):
        chip(tmp_path, number, rails)
    found = {meter.scope: meter for meter in ina3221.open(tmp_path)}
    assert {scope for scope, meter in found.items() if meter.in_total} == {
        "VDD_GPU_SOC",
        "VDD_CPU_CV",
        "VIN_SYS_5V0",
    }
    assert "VIN_SYS_5V0" in found["VDDQ_VDD2_1V8AO"].note
    assert "NC" not in found


def test_rails_of_an_unknown_board_are_shown_and_not_added(tmp_path):
    chip(tmp_path, 0, [("RAIL_A", 5000, 100), ("RAIL_B", 3300, 100)])
    found = ina3221.open(tmp_path)
    assert not any(meter.in_total for meter in found)
    assert "choose with --meter" in found[0].note


def test_the_older_iio_files_of_a_jetson_nano(tmp_path):
    device = "sys/bus/i2c/drivers/ina3221x/6-0040/iio:device0"
    for channel, (rail, milliwatts) in enumerate(
        [("POM_5V_IN", 2511), ("POM_5V_GPU", 41), ("POM_5V_CPU", 616)]
    ):
        boards_at.put(tmp_path, f"{device}/rail_name_{channel}", rail)
        boards_at.put(tmp_path, f"{device}/in_power{channel}_input", milliwatts)
    found = {meter.scope: meter for meter in ina3221.open(tmp_path)}
    assert [scope for scope, meter in found.items() if meter.in_total] == ["POM_5V_IN"]
    assert found["POM_5V_IN"].sampler._read_power_w() == pytest.approx(2.511)


def test_a_rail_that_cannot_be_read_is_named(tmp_path):
    root = boards_at.copy("jetson-orin", tmp_path)
    boards_at.put(root, "sys/class/hwmon/hwmon1/curr1_input", "")
    missing = ina3221.open(root)[0]
    assert isinstance(missing, Unavailable)
    assert missing.sensor == "ina3221:VDD_IN"
    assert missing.in_total


PI5 = (boards_at.BOARDS / "pi5/usr/bin/vcgencmd.pmic_read_adc").read_text()


def test_the_pmic_adds_volts_times_amperes_of_rails_with_both():
    rails = pmic._rails(PI5)
    assert len(rails) == 12
    assert rails["VDD_CORE"] == pytest.approx(5.03652 * 0.8936988)
    assert "EXT5V" not in rails
    assert "BATT" not in rails


@pytest.mark.parametrize(
    "output",
    ["", "error=2 error_msg=...", PI5.replace("VDD_CORE", "VDD_CARE"), PI5[:200], "=1.2.3A" * 9],
)
def test_an_odd_vcgencmd_is_unavailable_first_and_a_fault_later(output):
    [missing] = pmic.open(boards_at.BOARDS / "pi5", run=lambda: output)
    assert isinstance(missing, Unavailable)
    assert "usermod -aG video" in missing.remedy
    outputs = iter([PI5, output])
    [meter] = pmic.open(boards_at.BOARDS / "pi5", run=lambda: next(outputs))
    with pytest.raises(MeterFault, match="garbage"):
        meter.read()


def test_amd_energy_sockets_are_packages_and_cores_lie_inside(tmp_path):
    folder = "sys/class/hwmon/hwmon5"
    boards_at.put(tmp_path, f"{folder}/name", "amd_energy")
    for channel, label in enumerate(["Ecore000", "Ecore001", "Esocket0", "Esocket1"], 1):
        boards_at.put(tmp_path, f"{folder}/energy{channel}_label", label)
        boards_at.put(tmp_path, f"{folder}/energy{channel}_input", 1000 * channel)
    found = hwmon.open(tmp_path)
    assert [m.scope for m in found if m.in_total] == ["package-0", "package-1"]
    assert [m.read().count for m in found] == [1000, 2000, 3000, 4000]
    assert all(m.source == "measured" for m in found)


def test_two_chips_of_one_driver_have_names_of_their_own(tmp_path):
    for number in (0, 1):
        boards_at.put(tmp_path, f"sys/class/hwmon/hwmon{number}/name", "ina226")
        boards_at.put(tmp_path, f"sys/class/hwmon/hwmon{number}/power1_input", 1_000_000)
    names = [meter.name for meter in hwmon.open(tmp_path)]
    assert names == ["hwmon:ina226/power1", "hwmon:ina226@hwmon1/power1"]


def test_power_input_is_preferred_to_the_average_and_batteries_are_left_to_battery(tmp_path):
    folder = "sys/class/hwmon/hwmon0"
    boards_at.put(tmp_path, f"{folder}/name", "psu")
    boards_at.put(tmp_path, f"{folder}/power1_input", 2_000_000)
    boards_at.put(tmp_path, f"{folder}/power1_average", 1_000_000)
    boards_at.put(tmp_path, f"{folder}/update_interval", 500)
    [meter] = hwmon.open(tmp_path)
    assert meter.sampler._read_power_w() == 2.0
    assert (meter.tick.seconds, meter.sampler.period_s) == (0.5, 0.25)
    assert all(isinstance(m, Unavailable) for m in hwmon.open(boards_at.BOARDS / "laptop"))


def cell(root, **files):
    for name, content in {"type": "Battery", "status": "Discharging", **files}.items():
        boards_at.put(root, f"sys/class/power_supply/BAT0/{name}", content)


def test_a_battery_with_current_and_charge_only(tmp_path):
    cell(
        tmp_path,
        current_now=-1_621_000,
        voltage_now=11_712_000,
        charge_now=642_000,
        voltage_min_design=11_100_000,
    )
    power, left = battery.open(tmp_path)
    assert power.sampler._read_power_w() == pytest.approx(1.621 * 11.712)
    assert left.read().count == 0
    cell(tmp_path, charge_now=641_000, voltage_now=11_500_000)
    assert left.read().count == 1000 * 11.1 * 3600  # 1 mAh at the design voltage
    assert not left.in_total


def test_a_battery_that_goes_on_the_charger_is_a_fault(tmp_path):
    root = boards_at.copy("laptop", tmp_path)
    power, left = battery.open(root)
    boards_at.put(root, "sys/class/power_supply/BAT0/status", "Charging")
    for meter in (power, left):
        with pytest.raises(MeterFault) as caught:
            meter.read()
        assert caught.value.fault == "unreadable"
        assert "now Charging" in caught.value.detail


@pytest.mark.parametrize("status", ["Charging", "Full", "Not charging", "Unknown"])
def test_a_battery_on_mains_is_no_meter(tmp_path, status):
    cell(tmp_path, status=status, power_now=5_000_000)
    [missing] = battery.open(tmp_path)
    assert f"its status is {status}" in missing.reason
    assert missing.remedy == "unplug the charger"


def test_energy_of_the_battery_counts_up_as_it_empties(tmp_path):
    root = boards_at.copy("laptop", tmp_path)
    _, left = battery.open(root)
    boards_at.put(root, "sys/class/power_supply/BAT0/energy_now", 32_340_000)
    assert left.read().count == 36_000_000  # 10 mWh


def test_a_mouse_is_not_the_machine(tmp_path):
    cell(tmp_path, scope="Device", power_now=5)
    [missing] = battery.open(tmp_path)
    assert missing.reason == "no battery feeds this machine"


def test_apples_channels_become_domains_in_their_own_units():
    now = {
        "CPU Energy": (5_000, "mJ"),
        "ECPU0": (100, "mJ"),
        "GPU Energy": (7_000_000, "nJ"),
        "DRAM": (3, "furlongs"),
    }
    found = {meter.scope: meter for meter in apple.open(channels=lambda: now)}
    assert set(found) == {"cpu", "gpu"}  # a part and an unknown unit are left out
    assert found["cpu"].read().count == 5_000_000
    assert found["gpu"].read().count == 7_000
    assert [scope for scope, meter in found.items() if meter.in_total] == ["cpu"]
    del now["CPU Energy"]
    with pytest.raises(MeterFault, match="vanished"):
        found["cpu"].read()
    now["GPU Energy"] = (-1, "nJ")
    with pytest.raises(MeterFault, match="garbage"):
        found["gpu"].read()


def test_apple_is_unavailable_elsewhere_or_when_it_refuses():
    assert isinstance(apple.open()[0], (Meter, Unavailable))

    def refused():
        raise MeterFault("unreadable", "IOReport gave no sample")

    [missing] = apple.open(channels=refused)
    assert missing.reason == "IOReport gave no sample"
    [missing] = apple.open(channels=dict)
    assert "no energy channel" in missing.reason
