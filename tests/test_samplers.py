"""Samplers against closed forms: of Gaussian data N(mu, s^2) the best denoiser is known exactly."""

import math
from itertools import pairwise
from typing import get_args

import numpy as np
import pytest

from leangen import samplers
from leangen.errors import RequestError, UnsupportedError
from leangen.samplers import CLEAN, SAMPLERS, Level, schedules

MEAN, SPREAD = 0.3, 0.7
SIGMA_MAX = 10.0
DETERMINISTIC = {"ddim": 1, "dpmpp_2m": 2, "euler": 1, "heun": 2, "unipc": 2}
"""Order of each method that solves the probability-flow ODE."""


def denoise(x, level):
    """E[x0 | x] for x = alpha x0 + sigma noise."""
    alpha, sigma = level
    keep = alpha * SPREAD**2 / ((alpha * SPREAD) ** 2 + sigma**2)
    return MEAN + keep * (x - alpha * MEAN)


def solution(x, level):
    """Where the ODE takes x from a level to the clean sample."""
    alpha, sigma = level
    return MEAN + (x - alpha * MEAN) * SPREAD / np.hypot(alpha * SPREAD, sigma)


VP = {"kind": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}
VARIABLES = {
    "karras": lambda steps: schedules.karras(steps, 1e-3, SIGMA_MAX),
    "variance-preserving": lambda steps: schedules.spaced(schedules.trained(VP), steps),
    "zero-snr": lambda steps: schedules.spaced(
        schedules.trained({**VP, "zero_terminal_snr": True}), steps, "trailing"
    ),
    "flow": schedules.flow,
}
"""Levels in each of the variables that models are trained in, by the number of steps."""


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count) * SIGMA_MAX


def rng():
    return np.random.default_rng(0)


def last(name, function, x, levels):
    """x after all steps."""
    *_, x = samplers.get(name).sample(function, x, levels, rng())
    return x


def error(name, steps):
    x = noise(64)
    levels = schedules.karras(steps, 1e-3, SIGMA_MAX)
    return np.abs(last(name, denoise, x, levels) - solution(x, levels[0])).max()


@pytest.mark.parametrize(("name", "order"), DETERMINISTIC.items())
def test_the_trajectory_converges_to_the_solution_at_the_methods_order(name, order):
    coarse, fine = error(name, 64), error(name, 128)
    assert fine < 0.05
    assert math.log2(coarse / fine) > order - 0.25


@pytest.mark.parametrize("variables", VARIABLES)
@pytest.mark.parametrize("name", SAMPLERS)
def test_samples_of_gaussian_data_are_that_gaussian_in_all_variables(name, variables):
    """Of consistency models alone, the exact consistency function is the model."""
    count = 20_000
    levels = VARIABLES[variables](100)
    model = solution if SAMPLERS[name] == SAMPLERS["consistency"] else denoise
    start = np.random.default_rng(3).standard_normal(count)
    x = levels[0].alpha * MEAN + start * np.hypot(levels[0].alpha * SPREAD, levels[0].sigma)
    x = last(name, model, x, levels)
    assert np.isfinite(x).all()
    assert x.mean() == pytest.approx(MEAN, abs=0.03)
    assert x.std() == pytest.approx(SPREAD, rel=0.07)  # ddpm with its small variance: 0.66


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_more_steps_come_closer_to_the_flow_from_pure_noise(name):
    """At alpha = 0 log SNR is infinite: the first step must not spoil the others."""
    x = np.random.default_rng(4).standard_normal(64)
    coarse, fine = (
        np.abs(last(name, denoise, x, schedules.flow(steps)) - solution(x, Level(0, 1))).max()
        for steps in (8, 64)
    )
    assert fine < coarse / 4 and fine < 0.05


def test_heun_beats_euler_for_the_same_denoiser_calls():
    assert error("heun", 32) < error("euler", 63) / 4


def test_euler_is_that_of_karras_and_of_flow_matching():
    """Both written out as they are in the papers."""
    x = noise(64)
    levels = schedules.karras(20, 0.01, SIGMA_MAX)
    ours = samplers.get("euler").sample(denoise, x, levels, rng())
    for level, following, mine in zip(levels[:-1], levels[1:], ours, strict=True):
        slope = (x - denoise(x, level)) / level.sigma
        x = x + (following.sigma - level.sigma) * slope
        np.testing.assert_allclose(mine, x, rtol=1e-9, atol=1e-9)

    x = noise(64) / SIGMA_MAX
    levels = schedules.flow(20)
    ours = samplers.get("euler").sample(denoise, x, levels, rng())
    for level, following, mine in zip(levels[:-1], levels[1:], ours, strict=True):
        clean = denoise(x, level)
        velocity = (x - level.alpha * clean) / level.sigma - clean
        x = x + (following.sigma - level.sigma) * velocity
        np.testing.assert_allclose(mine, x, rtol=1e-9, atol=1e-9)


def test_one_sde_step_of_dpm_solver_is_one_of_ddpm():
    """arXiv 2211.01095, appendix A: the first-order SDE solver is ancestral sampling."""
    x = noise(64)
    levels = [Level(0.6, 0.8), Level(0.8, 0.6)]
    names = ("ddpm", "dpmpp_2m_sde")
    ddpm, sde = (last(name, denoise, x, levels) for name in names)
    np.testing.assert_allclose(ddpm, sde, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_is_yielded_and_float32_stays_float32(name, steps):
    x = noise(8).astype(np.float32)
    levels = schedules.karras(steps, 0.002, SIGMA_MAX)
    single = lambda x, level: denoise(x, level).astype(np.float32)  # noqa: E731
    seen = list(samplers.get(name).sample(single, x, levels, rng()))
    assert len(seen) == steps
    assert all(each.dtype == np.float32 and each.shape == x.shape for each in seen)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_one_step_to_zero_is_the_denoisers_answer(name):
    x = noise(32)
    ours = last(name, denoise, x, [Level(1.0, SIGMA_MAX), CLEAN])
    np.testing.assert_allclose(ours, denoise(x, Level(1.0, SIGMA_MAX)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", DETERMINISTIC)
def test_no_noise_is_drawn_by_the_deterministic_ones(name):
    generator = rng()
    before = generator.bit_generator.state
    list(samplers.get(name).sample(denoise, noise(4), schedules.karras(3, 0.01, 10), generator))
    assert generator.bit_generator.state == before


def test_consistency_steps_keep_the_distribution():
    """With the exact consistency function, any number of steps samples N(mu, s^2)."""
    count = 40_000
    start = MEAN + noise(count) * np.sqrt(1 + (SPREAD / SIGMA_MAX) ** 2)
    x = last(
        "consistency",
        solution,
        start,
        [*(Level(1.0, sigma) for sigma in (SIGMA_MAX, 3.0, 0.5)), CLEAN],
    )
    assert x.mean() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(count))
    assert x.std() == pytest.approx(SPREAD, rel=5 / math.sqrt(2 * count))


def test_an_unknown_sampler_is_an_error_that_lists_what_there_is():
    with pytest.raises(
        RequestError, match=r"'plms' is unknown: expected one of " + ", ".join(SAMPLERS)
    ):
        samplers.get("plms")


# Schedules


@pytest.mark.parametrize("rho", [1.0, 3.0, 7.0])
@pytest.mark.parametrize("steps", [2, 5, 18])
def test_karras_is_equation_5(steps, rho):
    low, high = 0.002, 80.0
    expected = [
        (high ** (1 / rho) + i / (steps - 1) * (low ** (1 / rho) - high ** (1 / rho))) ** rho
        for i in range(steps)
    ]
    ours = schedules.karras(steps, low, high, rho)
    assert {level.alpha for level in ours} == {1.0}
    np.testing.assert_allclose([level.sigma for level in ours], [*expected, 0.0], rtol=1e-9)


def betas_of(kind, count):
    """Noise added by each training step, written out step by step."""
    if kind == "linear":
        return [1e-4 + (0.02 - 1e-4) * t / (count - 1) for t in range(count)]
    if kind == "scaled_linear":
        low, high = math.sqrt(1e-4), math.sqrt(0.02)
        return [(low + (high - low) * t / (count - 1)) ** 2 for t in range(count)]

    def kept(t):
        return math.cos((t / count + 0.008) / 1.008 * math.pi / 2) ** 2

    return [min(1 - kept(t + 1) / kept(t), 0.999) for t in range(count)]


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_trained_levels_follow_from_the_betas(kind):
    count = 200
    schedule = {"kind": kind, "timesteps": count, "beta_start": 1e-4, "beta_end": 0.02}
    signal, expected = 1.0, []
    for beta in betas_of(kind, count):
        signal *= 1 - beta
        expected.append((math.sqrt(signal), math.sqrt(1 - signal)))
    np.testing.assert_allclose(schedules.trained(schedule), expected, rtol=1e-9)


@pytest.mark.parametrize("kind", schedules.KINDS)
def test_zero_terminal_snr_moves_the_last_level_and_keeps_the_first(kind):
    plain = schedules.trained({**VP, "kind": kind})
    moved = schedules.trained({**VP, "kind": kind, "zero_terminal_snr": True})
    assert moved[-1] == (0.0, 1.0)
    assert moved[0].alpha == pytest.approx(plain[0].alpha, rel=1e-9)
    assert all(a.alpha > b.alpha for a, b in pairwise(moved))


def test_an_unknown_schedule_or_spacing_is_refused():
    with pytest.raises(UnsupportedError, match="'square' is unknown: expected one of linear"):
        schedules.trained({**VP, "kind": "square"})
    with pytest.raises(UnsupportedError, match="'odd' is unknown: expected one of linspace"):
        schedules.spaced(schedules.trained(VP), 5, "odd")


@pytest.mark.parametrize("spacing", schedules.SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_steps_visit_levels_of_falling_noise_and_end_clean(steps, spacing):
    trained = schedules.trained({**VP, "timesteps": 200})
    if spacing == "distilled":
        steps = min(steps, 50)  # the family refuses more
    ours = schedules.spaced(trained, steps, spacing)
    assert len(ours) == steps + 1
    assert ours[-1] == CLEAN
    assert all(a.log_snr < b.log_snr for a, b in pairwise(ours))
    if spacing not in ("even", "karras"):
        assert set(ours[:-1]) <= set(trained)
    if spacing != "leading":
        assert ours[0] == pytest.approx(trained[-1])
    if spacing not in ("karras", "leading"):  # pure noise is exactly that
        pure = schedules.trained({**VP, "timesteps": 200, "zero_terminal_snr": True})
        assert schedules.spaced(pure, steps, spacing)[0] == (0, 1)
    if spacing in ("even", "linspace") and steps > 1:
        assert ours[-2] == pytest.approx(trained[0])
    if steps < 50:
        more = schedules.spaced(trained, steps + 1, spacing)
        assert schedules.spaced(trained, steps, spacing, inner=True) == [*more[:-2], CLEAN]


def test_flow_levels_go_from_noise_to_the_sample_and_shift_keeps_both_ends():
    for shift in (1.0, 3.0):
        levels = schedules.flow(4, shift)
        assert levels[0] == (0, 1) and levels[-1] == (1, 0)
        assert all(level.alpha + level.sigma == 1 for level in levels)
    assert [level.sigma for level in schedules.flow(4)] == [1, 0.75, 0.5, 0.25, 0]
    assert schedules.flow(2, 3.0)[1].sigma == pytest.approx(0.75)
    assert [level.sigma for level in schedules.flow(3, lowest=0.5)] == [1, 0.75, 0.5, 0]


def test_a_level_between_two_timesteps_lies_between_them():
    trained = schedules.trained(VP)
    for place in (0, 40, 999):
        assert schedules.timestep(trained, trained[place]) == pytest.approx(place)
    between = Level(*((a + b) / 2 for a, b in zip(trained[500], trained[501], strict=True)))
    assert 500 < schedules.timestep(trained, between) < 501


@pytest.mark.parametrize("level", [Level(1.0, 2.5), Level(0.6, 0.8), Level(0.3, 0.7), Level(0, 1)])
@pytest.mark.parametrize("prediction", get_args(schedules.Prediction))
def test_whatever_a_model_predicts_the_clean_sample_comes_out(prediction, level):
    alpha, sigma = level
    clean, eps = noise(16), noise(16, seed=1) / SIGMA_MAX
    v = alpha * eps - sigma * clean
    answer = {"sample": clean, "epsilon": eps, "v": v, "flow": eps - clean}[prediction]
    x = alpha * clean + sigma * eps
    if prediction == "epsilon" and alpha == 0:
        with pytest.raises(UnsupportedError, match="zero signal-to-noise ratio"):
            schedules.clean(prediction, answer, x, level)
    else:
        ours = schedules.clean(prediction, answer, x, level)
        np.testing.assert_allclose(ours, clean, rtol=1e-9, atol=1e-9)
