"""Laws of the accounting: parts sum to wholes, unknown is not zero, uncertainties add up."""

from __future__ import annotations

import math

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from leangen.attribution import largest_remainder
from leangen.energy import FAULTS, Baseline, account
from leangen.records import MeterWindow


def window(
    energy_uj=4_100_000, *, sensor="rapl:package-0", random_j=0.05, systematic_j=0.2, **more
):
    return MeterWindow(
        **{
            "sensor": sensor,
            "source": "measured",
            "energy_uj": energy_uj,
            "u_random_j": random_j,
            "u_systematic_j": systematic_j,
            "tick_s": 0.001,
            **more,
        }
    )


def baseline(power_w=2.0, random_w=0.1, systematic_w=0.1, scope=("package-0",)):
    return Baseline(
        power_w=power_w,
        u_random_w=random_w,
        u_systematic_w=systematic_w,
        duration_s=1.0,
        scope=scope,
        how="test",
    )


def simple(windows=None, **changes):
    arguments = {
        "scope": ("package-0",),
        "reason": None,
        "duration_ns": 500_000_000,
        "baseline": baseline(),
        "units": 64,
        "steps": [("prefill", 40), ("decode", 230), ("decode", 230)],
        **changes,
    }
    return account([window()] if windows is None else windows, **arguments)


@given(
    total=st.integers(-(10**15), 10**15),
    weights=st.lists(st.integers(0, 10**12), min_size=1, max_size=30),
)
def test_shares_sum_exactly_and_are_quotas_rounded(total, weights):
    assume(sum(weights) > 0)
    parts = largest_remainder(total, weights)
    assert sum(parts) == total
    for part, weight in zip(parts, weights, strict=True):
        # Exact integers: |part - total * weight / whole| < 1.
        assert abs(part * sum(weights) - total * weight) < sum(weights)
        if weight == 0:
            assert part == 0
    assert largest_remainder(-total, weights) == [-part for part in parts]


@given(
    total=st.integers(0, 10**12),
    weights=st.lists(st.integers(1, 10**9), min_size=1, max_size=20, unique=True),
    seed=st.randoms(use_true_random=False),
)
def test_shares_do_not_depend_on_order_up_to_ties(total, weights, seed):
    whole = sum(weights)
    remainders = [total * weight % whole for weight in weights]
    assume(len(set(remainders)) == len(remainders))
    order = list(range(len(weights)))
    seed.shuffle(order)
    straight = largest_remainder(total, weights)
    shuffled = largest_remainder(total, [weights[i] for i in order])
    assert shuffled == [straight[i] for i in order]


@given(
    total=st.integers(-(10**9), 10**9),
    weights=st.lists(st.floats(0, 1e6, allow_nan=False), min_size=1, max_size=10),
)
def test_float_weights_share_exactly_too(total, weights):
    assume(sum(weights) > 0)
    assert sum(largest_remainder(total, weights)) == total


@pytest.mark.parametrize("weights", [[], [0, 0], [1, -1], [math.nan], [math.inf]])
def test_shares_need_something_to_share_by(weights):
    with pytest.raises(ValueError):
        largest_remainder(10, weights)


@given(
    energies_uj=st.lists(st.integers(1, 10**9), min_size=1, max_size=5),
    duration_ns=st.integers(1, 10**12),
    power_w=st.floats(0, 500),
    steps=st.lists(
        st.tuples(st.sampled_from(["prefill", "decode", "denoise"]), st.integers(1, 10**9)),
        max_size=20,
    ),
)
def test_gross_is_idle_plus_marginal_and_the_sum_of_its_steps(
    energies_uj, duration_ns, power_w, steps
):
    scope = tuple(f"package-{i}" for i in range(len(energies_uj)))
    energy = simple(
        [window(uj, sensor=f"rapl:{name}") for uj, name in zip(energies_uj, scope, strict=True)],
        scope=scope,
        duration_ns=duration_ns,
        baseline=baseline(power_w, scope=scope),
        steps=steps,
    )
    assert energy.gross_uj == sum(energies_uj)
    assert energy.gross_uj == energy.idle_uj + energy.marginal_uj
    if steps:
        assert sum(step.energy_uj for step in energy.steps) == energy.gross_uj
    assert len(energy.steps) == len({kind for kind, _ in steps})
    assert energy.u_j >= max(energy.u_random_j, energy.u_systematic_j)
    assert energy.marginal_u_j >= 0


def test_random_parts_add_in_quadrature_and_systematic_ones_linearly():
    energy = simple(
        [window(random_j=0.3, systematic_j=0.1), window(random_j=0.4, systematic_j=0.2)],
        scope=("package-0", "dram-0"),
        baseline=None,
    )
    assert energy.u_random_j == pytest.approx(0.5)
    assert energy.u_systematic_j == pytest.approx(0.3)
    assert energy.u_j == pytest.approx(math.hypot(0.5, 0.3))


def test_the_receipt_of_the_design():
    energy = simple(baseline=baseline(2.4, 0.1, 0.12))
    assert energy.to_json()["gross_j"] == 4.1
    assert energy.u_j == pytest.approx(0.206, abs=1e-3)
    assert energy.idle_j == pytest.approx(1.2)
    assert energy.marginal_j == pytest.approx(2.9)
    assert energy.per_unit_j == pytest.approx(4.1 / 64)
    assert energy.per_unit_u_j == pytest.approx(energy.u_j / 64)
    assert energy.reason is None
    assert [step.method for step in energy.steps] == ["shared", "shared"]


def test_the_gain_of_one_meter_is_common_to_gross_and_idle():
    # 5% of 4.1 J and 5% of 1.2 J are the same 5%: they leave 5% of the difference.
    energy = simple([window(random_j=0.0, systematic_j=0.205)], baseline=baseline(2.4, 0.0, 0.12))
    assert energy.marginal_u_j == pytest.approx(0.05 * 2.9)


def test_a_negative_marginal_is_shown():
    energy = simple(baseline=baseline(10.0))
    assert energy.marginal_uj == 4_100_000 - 5_000_000
    assert energy.to_json()["marginal_j"] == -0.9


def test_without_a_baseline_idle_and_marginal_are_unknown():
    energy = simple(baseline=None)
    assert (energy.idle_uj, energy.marginal_uj, energy.marginal_u_j) == (None, None, None)
    assert energy.gross_uj == 4_100_000
    assert "no idle baseline" in energy.reason


def test_a_baseline_of_another_scope_is_not_used():
    energy = simple(baseline=baseline(scope=("package-0", "dram-0")))
    assert energy.marginal_uj is None
    assert "covers package-0, dram-0" in energy.reason


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_faulted_meter_makes_the_total_unknown_and_says_why(fault):
    windows = [window(), window(None, sensor="rapl:dram-0", faults=(fault,))]
    energy = simple(windows, scope=("package-0", "dram-0"))
    assert energy.source == "unavailable"
    for name in ("gross_j", "u_j", "idle_j", "marginal_j", "per_unit_j"):
        assert energy.to_json()[name] is None
    assert energy.steps == ()
    assert f"rapl:dram-0: {FAULTS[fault]}" in energy.reason
    assert [m.energy_uj for m in energy.meters] == [4_100_000, None]


def test_no_meter_is_unavailable_with_a_reason():
    energy = simple([], scope=(), baseline=None)
    assert (energy.source, energy.gross_uj, energy.reason) == (
        "unavailable",
        None,
        "there is no meter",
    )


def test_an_estimate_is_never_added_to_a_measurement():
    with pytest.raises(ValueError, match="estimated, measured"):
        simple([window(), window(source="estimated")], scope=("package-0", "process-1"))


def test_a_window_below_the_tick_says_so():
    energy = simple([window(tick_s=0.1)], duration_ns=20_000_000)
    assert "the interval of 20 ms is shorter than its tick of 100 ms" in energy.reason


def test_no_units_no_energy_per_unit():
    assert simple(units=0).per_unit_j is None


def test_a_lone_kind_of_a_measured_total_is_measured():
    energy = simple(steps=[("denoise", 5), ("denoise", 6)])
    [step] = energy.steps
    assert (step.method, step.energy_uj, step.u_j) == (
        "measured",
        energy.gross_uj,
        pytest.approx(energy.u_j),
    )
    estimated = simple([window(source="estimated")], steps=[("denoise", 5)])
    assert estimated.steps[0].method == "shared"


@given(
    prefill_w=st.floats(3, 60),
    decode_w=st.floats(3, 60),
    fraction=st.floats(0.01, 0.99),
)
def test_shared_steps_hold_the_truth_when_power_differs_by_kind(prefill_w, decode_w, fraction):
    """Two kinds above an idle power of 2 W; the meter itself is exact."""
    truth_j = {"prefill": prefill_w * fraction, "decode": decode_w * (1 - fraction)}
    mean_w = sum(truth_j.values()) - 2.0
    assume(abs(prefill_w - decode_w) <= mean_w)
    energy = simple(
        [window(round(sum(truth_j.values()) * 1e6), random_j=0.0, systematic_j=0.0)],
        duration_ns=10**9,
        baseline=baseline(2.0, 0.0, 0.0),
        steps=[("prefill", round(fraction * 1e9)), ("decode", round((1 - fraction) * 1e9))],
    )
    for step in energy.steps:
        assert abs(step.energy_uj / 1e6 - truth_j[step.kind]) <= step.u_j + 1e-5
