"""Laws of sharing: parts sum to wholes exactly, and the truth lies within the stated u."""

from __future__ import annotations

import math
import random

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from leangen import attribution
from leangen.attribution import CpuTimes, RequestShares, process_share, share_steps

KINDS = st.sampled_from(["prefill", "decode", "denoise", "flow"])
STEPS = st.lists(st.tuples(KINDS, st.integers(1, 10**9)), min_size=1, max_size=90)


def shared(gross_uj, steps, marks=None, **changes):
    arguments = {
        "source": "measured",
        "u_random_j": 0.1,
        "u_systematic_j": 0.2,
        "contrast_j": gross_uj / 1e6,
        "tick_s": 0.001,
        **changes,
    }
    return share_steps(gross_uj, steps, marks or {}, **arguments)


@given(steps=STEPS, gross_uj=st.integers(0, 10**12), data=st.data())
def test_steps_and_kinds_sum_to_the_total_whatever_was_looked_at(steps, gross_uj, data):
    looked = data.draw(st.sets(st.integers(0, len(steps) - 1)))
    levels = sorted(
        data.draw(st.lists(st.integers(0, gross_uj), min_size=len(looked), max_size=len(looked)))
    )
    kinds = shared(gross_uj, steps, dict(zip(sorted(looked), levels, strict=True)))
    assert sum(kind.energy_uj for kind in kinds) == gross_uj
    for kind in kinds:
        count = sum(name == kind.kind for name, _ in steps)
        assert len(kind.each_uj) == (count if count <= attribution.EACH_LIMIT else 0)
        if kind.each_uj:
            assert sum(kind.each_uj) == kind.energy_uj
        assert kind.u_j >= 0


def test_a_kind_between_looks_of_its_own_is_measured_and_not_shared():
    steps = [("prefill", 100_000_000), *[("decode", 20_000_000)] * 5]
    blind = {kind.kind: kind for kind in shared(10_000_000, steps)}
    assert {kind.method for kind in blind.values()} == {"shared"}
    assert blind["prefill"].energy_uj == 5_000_000

    seen = {kind.kind: kind for kind in shared(10_000_000, steps, {0: 8_000_000, 2: 9_000_000})}
    assert {kind.method for kind in seen.values()} == {"measured"}
    assert (seen["prefill"].energy_uj, seen["decode"].energy_uj) == (8_000_000, 2_000_000)
    assert seen["decode"].each_uj[:2] == (500_000, 500_000)
    assert (seen["prefill"].each_method, seen["decode"].each_method) == ("measured", "shared")
    assert seen["prefill"].u_j < blind["prefill"].u_j


def test_each_denoising_step_is_listed():
    steps = [("denoise", 50_000_000)] * 4 + [("decode", 30_000_000)]
    marks = {0: 1_000_000, 1: 3_000_000, 2: 4_000_000, 3: 6_000_000}
    denoise, decode = shared(7_000_000, steps, marks)
    assert denoise.each_uj == (1_000_000, 2_000_000, 1_000_000, 2_000_000)
    assert (denoise.each_method, decode.each_uj) == ("measured", (1_000_000,))
    assert denoise.to_json()["each_j"] == [1.0, 2.0, 1.0, 2.0]


def test_below_the_tick_a_step_gets_its_share_by_duration_labelled():
    steps = [("encode", 400_000), ("flow", 100_000_000)]
    encode, flow = shared(1_004_000, steps, {0: 5_000}, tick_s=0.1)
    assert (encode.method, flow.method) == ("shared", "measured")
    assert shared(1_004_000, steps, tick_s=0.1)[0].energy_uj == 4_000


def test_the_total_of_an_estimate_is_never_measured():
    steps = [("prefill", 10**8), ("decode", 10**8)]
    assert {k.method for k in shared(10**6, steps, {0: 5 * 10**5}, source="estimated")} == {
        "shared"
    }


@given(
    powers_w=st.tuples(st.floats(1, 60), st.floats(1, 60)),
    durations_ms=st.lists(st.tuples(st.booleans(), st.integers(5, 50)), min_size=2, max_size=30),
    every=st.integers(1, 7),
)
def test_the_truth_of_each_kind_lies_within_u(powers_w, durations_ms, every):
    """Two kinds of steady power, an exact meter looked at after every few steps."""
    assume(len({kind for kind, _ in durations_ms}) == 2)
    names = {False: "prefill", True: "decode"}
    truth_j = {"prefill": 0.0, "decode": 0.0}
    steps, marks, total_j = [], {}, 0.0
    for index, (kind, ms) in enumerate(durations_ms):
        joules = powers_w[kind] * ms / 1e3
        truth_j[names[kind]] += joules
        total_j += joules
        steps.append((names[kind], ms * 1_000_000))
        if index % every == 0:
            marks[index] = round(total_j * 1e6)
    # Kinds differ in power by at most the mean: what `contrast_j` says.
    seconds = sum(ms for _, ms in durations_ms) / 1e3
    assume(abs(powers_w[0] - powers_w[1]) <= total_j / seconds)
    for kind in shared(round(total_j * 1e6), steps, marks, u_random_j=0.0, u_systematic_j=0.0):
        assert abs(kind.energy_uj / 1e6 - truth_j[kind.kind]) <= kind.u_j + 1e-4


@given(seed=st.integers(0, 10**6))
def test_concurrent_requests_share_all_of_it_under_any_schedule(seed):
    """Requests come and go; what they and the idle time get is what was measured, to the last."""
    rng = random.Random(seed)
    shares, finished, measured_uj = RequestShares(), 0, 0
    live: dict[str, float] = {}
    for step in range(rng.randrange(1, 60)):
        if rng.random() < 0.4:
            live[f"request-{step}"] = rng.choice([0.5, 1, 3])
        energy_uj = rng.choice([0, 1, 7, rng.randrange(10**9)])
        measured_uj += energy_uj
        shares.add(energy_uj, {name: rate * rng.randrange(0, 4) for name, rate in live.items()})
        for name in [name for name in live if rng.random() < 0.2]:
            del live[name]
            finished += shares.finish(name)
        assert shares.total_uj + finished == measured_uj
        assert all(share >= 0 for share in shares.by_request.values())


def test_requests_share_by_work_done():
    shares = RequestShares()
    shares.add(100, {"a": 3, "b": 1})
    shares.add(50, {})
    shares.add(60, {"b": 2, "c": 0})
    assert shares.by_request == {"a": 75, "b": 85, "c": 0}
    assert (shares.unattributed_uj, shares.total_uj) == (50, 210)
    assert shares.finish("never seen") == 0
    with pytest.raises(ValueError, match="not negative"):
        shares.add(10, {"a": -1, "b": 2})


def stat(root, user, system=0, idle=100):
    (root / "proc").mkdir(exist_ok=True)
    (root / "proc/stat").write_text(f"cpu  {user} 0 {system} {idle} 5 0 0 9 0 0\ncpu0 1 2 3\n")
    return attribution.cpu_times(root).busy_s


def test_busy_time_leaves_idle_and_stolen_time_out(tmp_path):
    before = stat(tmp_path, 100)
    assert stat(tmp_path, 300, 50, idle=900) - before == pytest.approx(2.5)


def test_without_proc_stat_there_is_no_process_share(tmp_path):
    times = attribution.cpu_times(tmp_path)
    assert times.busy_s is None
    assert process_share(times, times, 10**6, 0.1) is None


def test_the_process_share_is_of_the_marginal_and_labelled():
    share = process_share(CpuTimes(1.0, 10.0), CpuTimes(1.75, 11.0), 4_000_000, 0.4)
    assert share["method"] == "cpu-time share"
    assert (share["share"], share["marginal_j"]) == (0.75, 3.0)
    # Others may draw more or less per CPU second than we do.
    assert share["u_j"] >= math.hypot(0.3, 0.75 * 0.25 * 4.0)
    assert process_share(CpuTimes(1.0, 10.0), CpuTimes(2.0, 11.0), None, None) is None


def test_alone_on_the_machine_all_of_it_is_ours_even_with_a_coarse_clock():
    share = process_share(CpuTimes(1.0, 10.0), CpuTimes(1.005, 10.0), 4_000_000, 0.4)
    assert share["share"] == 1.0
    assert share["u_j"] > 4.0  # 5 ms against a clock of 10 ms tells nothing
