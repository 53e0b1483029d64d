"""What can disturb a measurement is named, and what cannot be read is None."""

from leangen import environment


def test_an_unreadable_machine_is_all_none_and_says_so(tmp_path):
    state = environment.conditions(tmp_path)
    assert {state[key] for key in ("governor", "boost", "throttled", "load_1min", "cpu")} == {None}
    assert any("does not tell" in note for note in environment.warnings(state))


def test_a_laptop_that_throttles_is_described(tmp_path):
    cpu = tmp_path / environment.CPU
    (cpu / "cpu0/cpufreq").mkdir(parents=True)
    (cpu / "cpu0/cpufreq/scaling_governor").write_text("powersave\n")
    (cpu / "cpu0/thermal_throttle").mkdir()
    (cpu / "cpu0/thermal_throttle/core_throttle_count").write_text("3\n")
    (cpu / "intel_pstate").mkdir()
    (cpu / "intel_pstate/no_turbo").write_text("0\n")
    (tmp_path / "proc").mkdir()
    (tmp_path / "proc/loadavg").write_text("99.0 1.0 1.0 1/100 1\n")
    state = environment.conditions(tmp_path)
    assert (state["governor"], state["boost"], state["throttled"]) == ("powersave", True, 3)
    notes = " ".join(environment.warnings(state))
    for word in ("powersave", "boost", "throttled 3 times", "busy (load 99.0)"):
        assert word in notes
