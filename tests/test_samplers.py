"""Samplers against closed forms: of Gaussian data N(mu, s^2) the best denoiser is known exactly."""

import math

import numpy as np
import pytest

from leangen import samplers
from leangen.errors import RequestError
from leangen.samplers import schedules

MEAN, SPREAD = 0.3, 0.7
SIGMA_MAX = 10.0
DETERMINISTIC = {"ddim": 1, "euler": 1, "heun": 2}
"""Order of each method that solves the probability-flow ODE."""


def denoise(x, sigma):
    """E[x0 | x] for x = x0 + sigma * noise."""
    keep = SPREAD**2 / (SPREAD**2 + sigma**2)
    return MEAN + keep * (x - MEAN)


def solution(x, sigma):
    """Where the ODE takes x from noise level sigma to 0."""
    return MEAN + (x - MEAN) * SPREAD / np.sqrt(SPREAD**2 + sigma**2)


def noise(count, seed=0):
    return np.random.default_rng(seed).standard_normal(count) * SIGMA_MAX


def rng():
    return np.random.default_rng(0)


def last(name, function, x, sigmas):
    """x after all steps."""
    *_, x = samplers.get(name).sample(function, x, sigmas, rng())
    return x


def error(name, steps):
    x = noise(64)
    sigmas = schedules.karras(steps, 1e-3, SIGMA_MAX)
    return np.abs(last(name, denoise, x, sigmas) - solution(x, SIGMA_MAX)).max()


@pytest.mark.parametrize(("name", "order"), DETERMINISTIC.items())
def test_the_trajectory_converges_to_the_solution_at_the_methods_order(name, order):
    coarse, fine = error(name, 64), error(name, 128)
    assert fine < 0.05
    assert math.log2(coarse / fine) == pytest.approx(order, abs=0.25)


def test_heun_beats_euler_for_the_same_denoiser_calls():
    assert error("heun", 32) < error("euler", 63) / 4


def test_ddim_is_euler_in_these_variables():
    """Karras et al. 2022, appendix C: with eta 0 both take the same step."""
    sigmas = schedules.karras(20, 0.01, SIGMA_MAX)
    x = noise(64)
    pairs = zip(
        *(samplers.get(name).sample(denoise, x, sigmas, rng()) for name in ("ddim", "euler")),
        strict=True,
    )
    for ddim, euler in pairs:
        np.testing.assert_allclose(ddim, euler, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
@pytest.mark.parametrize("steps", [1, 2, 7])
def test_every_step_is_yielded_and_float32_stays_float32(name, steps):
    x = noise(8).astype(np.float32)
    sigmas = schedules.karras(steps, 0.002, SIGMA_MAX)
    single = lambda x, sigma: denoise(x, sigma).astype(np.float32)  # noqa: E731
    seen = list(samplers.get(name).sample(single, x, sigmas, rng()))
    assert len(seen) == steps
    assert all(each.dtype == np.float32 and each.shape == x.shape for each in seen)


@pytest.mark.parametrize("name", samplers.SAMPLERS)
def test_one_step_to_zero_is_the_denoisers_answer(name):
    x = noise(32)
    ours = last(name, denoise, x, [SIGMA_MAX, 0.0])
    np.testing.assert_allclose(ours, denoise(x, SIGMA_MAX), rtol=1e-6, atol=1e-6)


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
    x = last("consistency", solution, start, [SIGMA_MAX, 3.0, 0.5, 0.0])
    assert x.mean() == pytest.approx(MEAN, abs=5 * SPREAD / math.sqrt(count))
    assert x.std() == pytest.approx(SPREAD, rel=5 / math.sqrt(2 * count))


def test_an_unknown_sampler_is_an_error_that_lists_what_there_is():
    with pytest.raises(RequestError, match=r"'plms' is unknown: .*consistency, ddim, euler, heun"):
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
    np.testing.assert_allclose(ours, [*expected, 0.0], rtol=1e-9)
    assert ours == sorted(ours, reverse=True)


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
def test_vp_levels_follow_from_the_betas(kind):
    count = 200
    schedule = {"kind": kind, "timesteps": count, "beta_start": 1e-4, "beta_end": 0.02}
    signal, expected = 1.0, []
    for beta in betas_of(kind, count):
        signal *= 1 - beta
        expected.append(math.sqrt((1 - signal) / signal))
    ours = schedules.vp_sigmas(schedule)
    np.testing.assert_allclose(ours, expected, rtol=1e-9)
    assert (np.diff(ours) > 0).all()


@pytest.mark.parametrize("steps", [1, 2, 10, 200])
def test_spaced_levels_are_trained_ones_from_the_highest_to_the_lowest(steps):
    trained = np.linspace(0.1, 20, 200)
    ours = schedules.spaced(trained, steps)
    assert len(ours) == steps + 1
    assert ours[0] == trained[-1]
    assert ours[-1] == 0
    assert set(ours[:-1]) <= set(trained)
    assert ours == sorted(ours, reverse=True)
    assert steps == 1 or ours[-2] == trained[0]


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_a_variance_preserving_model_becomes_the_same_denoiser(prediction):
    """Whatever a perfect model predicts, E[x0 | x] comes out; it is asked at its timesteps."""
    schedule = {"kind": "linear", "timesteps": 100, "beta_start": 1e-3, "beta_end": 0.2}
    sigmas = schedules.vp_sigmas(schedule)
    asked = []

    def model(x, timestep):
        asked.append(timestep)
        alpha = 1 / math.sqrt(1 + sigmas[round(timestep)] ** 2)
        sigma = math.sqrt(1 - alpha**2)  # x = alpha x0 + sigma noise
        clean = denoise(x / alpha, sigma / alpha)
        eps = (x - alpha * clean) / sigma
        return {"sample": clean, "epsilon": eps, "v": alpha * eps - sigma * clean}[prediction]

    wrapped = schedules.variance_preserving(model, prediction, sigmas)
    x = noise(16)
    for place in (0, 40, 99):
        ours = wrapped(x, float(sigmas[place]))
        np.testing.assert_allclose(ours, denoise(x, sigmas[place]), rtol=1e-5, atol=1e-4)
    assert asked == pytest.approx([0, 40, 99])


@pytest.mark.parametrize("prediction", ["sample", "epsilon"])
def test_a_variance_exploding_model_becomes_the_same_denoiser(prediction):
    def model(x, sigma):
        clean = denoise(x, sigma)
        return clean if prediction == "sample" else (x - clean) / sigma

    x = noise(16)
    ours = schedules.variance_exploding(model, prediction)(x, 2.5)
    np.testing.assert_allclose(ours, denoise(x, 2.5), rtol=1e-6, atol=1e-6)


# Another implementation

VP = {"kind": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def epsilon(x, sigma):
    """The noise estimate of a variance-preserving model at sigma / sqrt(1 + sigma^2)."""
    grown = x * math.sqrt(1 + sigma**2)
    return (grown - denoise(grown, sigma)) / sigma


def test_euler_takes_the_steps_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scheduler = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="linspace"
    )
    scheduler.set_timesteps(10)  # 999 / 9 is whole: no rounding or interpolation of timesteps
    sigmas = schedules.spaced(schedules.vp_sigmas(VP), 10)
    np.testing.assert_allclose(scheduler.sigmas.numpy(), sigmas, rtol=1e-4)
    start = noise(16) * sigmas[0] / SIGMA_MAX
    x = torch.tensor(start)
    ours = samplers.get("euler").sample(denoise, start, sigmas, rng())
    for timestep, sigma, mine in zip(scheduler.timesteps, sigmas, ours, strict=False):
        scaled = scheduler.scale_model_input(x, timestep).numpy()
        x = scheduler.step(torch.tensor(epsilon(scaled, sigma)), timestep, x).prev_sample
        np.testing.assert_allclose(mine, x.numpy(), rtol=1e-3, atol=1e-3)


def test_ddim_takes_the_steps_of_diffusers():
    diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
    torch = pytest.importorskip("torch", reason="torch is not installed")
    scheduler = diffusers.DDIMScheduler(
        beta_start=1e-4, beta_end=0.02, timestep_spacing="trailing", clip_sample=False
    )
    scheduler.set_timesteps(10)
    trained = schedules.vp_sigmas(VP)
    sigmas = [*trained[scheduler.timesteps.numpy()].tolist(), 0.0]
    start = noise(16) * sigmas[0] / SIGMA_MAX
    x = torch.tensor(start / math.sqrt(1 + sigmas[0] ** 2))
    ours = samplers.get("ddim").sample(denoise, start, sigmas, rng())
    steps = zip(scheduler.timesteps, sigmas[:-1], sigmas[1:], ours, strict=True)
    for timestep, sigma, following, mine in steps:
        guess = torch.tensor(epsilon(x.numpy(), sigma))
        x = scheduler.step(guess, timestep, x).prev_sample
        grown = x.numpy() * math.sqrt(1 + following**2)
        np.testing.assert_allclose(mine, grown, rtol=1e-3, atol=1e-3)
