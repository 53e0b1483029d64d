"""Samplers against the closed form for Gaussian data, and the diffusion family end to end."""

import numpy as np
import pytest
from image_models import denoiser, gaussian_denoiser

from leangen import samplers
from leangen.errors import RequestError
from leangen.exporters import onnx_file
from leangen.families import diffusion
from leangen.samplers import SAMPLERS, schedules
from leangen.session import Session

MEAN, STD, TOP = 0.7, 0.5, 20.0


def exact_denoiser(x, sigma):
    """E[x0 | x] for x0 ~ N(MEAN, STD^2)."""
    return ((STD**2 * x + sigma**2 * MEAN) / (STD**2 + sigma**2)).astype(np.float32)


def exact_flow(x, start, end):
    """Solution of the probability-flow ODE of that Gaussian from sigma `start` to `end`."""
    shrink = np.sqrt((STD**2 + end**2) / (STD**2 + start**2))
    return MEAN + (x - MEAN) * shrink


def noise(shape=(4, 1, 16, 16)):
    return np.random.default_rng(0).standard_normal(shape, np.float32) * np.float32(TOP)


def solve(name, steps):
    sigmas = schedules.karras(steps, 0.01, TOP)
    drawn = list(samplers.get(name).sample(exact_denoiser, noise(), sigmas, rng()))
    assert len(drawn) == steps
    return drawn[-1]


def rng():
    return np.random.default_rng(1)


def finish(generator):
    steps = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return steps, stop.value


@pytest.mark.parametrize("name, order", [("euler", 1), ("ddim", 1), ("heun", 2)])
def test_ode_samplers_converge_to_the_exact_flow_at_their_order(name, order):
    exact = exact_flow(noise(), TOP, 0)
    coarse, fine = (np.abs(solve(name, steps) - exact).max() for steps in (32, 64))
    assert fine < 0.06
    assert coarse / fine > 2**order * 0.75


def test_ddim_is_the_step_of_the_paper_in_alpha_bar():
    sigma, following = 5.0, 2.0
    x = noise((1, 1, 4, 4))
    ours = next(samplers.get("ddim").sample(exact_denoiser, x, [sigma, following], rng()))
    a, b = 1 / (1 + sigma**2), 1 / (1 + following**2)
    clean = exact_denoiser(x, sigma).astype(np.float64)
    epsilon = (np.sqrt(a) * x - np.sqrt(a) * clean) / np.sqrt(1 - a)
    paper = np.sqrt(b) * clean + np.sqrt(1 - b) * epsilon
    assert np.allclose(ours, paper / np.sqrt(b), rtol=1e-5)


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_consistency_sampling_draws_from_the_data(steps):
    def consistency(x, sigma):
        return exact_flow(x, sigma, 0).astype(np.float32)

    # Data plus noise of level TOP, so that the start is exact too.
    x = np.float32(MEAN) + noise((64, 1, 32, 32)) * np.float32(np.hypot(STD, TOP) / TOP)
    sigmas = schedules.karras(steps, 0.5, TOP)
    *_, drawn = samplers.get("consistency").sample(consistency, x, sigmas, rng())
    assert abs(drawn.mean() - MEAN) < 0.01 and abs(drawn.std() - STD) < 0.01


@pytest.mark.parametrize("name", SAMPLERS)
def test_samplers_do_not_change_their_input_and_repeat(name):
    x = noise()
    kept = x.copy()
    first, second = (
        list(samplers.get(name).sample(exact_denoiser, x, [TOP, 1.0, 0.0], rng()))[-1]
        for _ in range(2)
    )
    assert np.array_equal(first, second) and np.array_equal(x, kept)
    assert first.dtype == np.float32


def test_unknown_sampler_names_the_known_ones():
    with pytest.raises(RequestError, match=r"'plms'.*consistency, ddim, euler, heun"):
        samplers.get("plms")


@pytest.mark.parametrize("steps", [1, 2, 7])
def test_karras_falls_from_the_highest_level_to_zero(steps):
    sigmas = schedules.karras(steps, 0.1, 80.0)
    assert len(sigmas) == steps + 1 and sigmas[0] == 80.0 and sigmas[-1] == 0.0
    assert all(a > b for a, b in zip(sigmas, sigmas[1:], strict=False))


@pytest.mark.parametrize("kind", ["linear", "scaled_linear", "cosine"])
def test_training_levels_rise_and_steps_visit_them_from_the_top(kind):
    schedule = {"kind": kind, "timesteps": 100, "beta_start": 1e-4, "beta_end": 0.02}
    sigmas = schedules.vp_sigmas(schedule)
    assert len(sigmas) == 100 and np.all(np.diff(sigmas) > 0)
    visited = schedules.spaced(sigmas, 10)
    assert visited[0] == sigmas[-1] and visited[-2:] == [sigmas[0], 0.0]


@pytest.mark.parametrize("prediction", ["sample", "epsilon", "v"])
def test_timestep_models_become_the_same_denoiser_whatever_they_predict(prediction):
    schedule = {"kind": "linear", "timesteps": 50, "beta_start": 1e-3, "beta_end": 0.2}
    sigmas = schedules.vp_sigmas(schedule)

    def trained(x_t, timestep):
        sigma = sigmas[round(timestep)]
        a = 1 / (1 + sigma**2)
        clean = exact_denoiser(x_t / np.sqrt(a), sigma).astype(np.float64)
        epsilon = (x_t - np.sqrt(a) * clean) / np.sqrt(1 - a)
        answers = {"sample": clean, "epsilon": epsilon}
        answers["v"] = np.sqrt(a) * epsilon - np.sqrt(1 - a) * clean
        return answers[prediction].astype(np.float32)

    denoise = schedules.variance_preserving(trained, prediction, sigmas)
    for sigma in sigmas[[0, 20, 49]]:
        x = noise((1, 1, 4, 4))
        assert np.allclose(denoise(x, sigma), exact_denoiser(x, sigma), atol=2e-3)


def test_a_multi_step_denoiser_file_draws_from_its_data(tmp_path):
    path = gaussian_denoiser(tmp_path / "gauss.onnx", MEAN, STD)
    bundle = onnx_file.export(path, tmp_path / "b", steps=20, sampler="heun", sigma_max=TOP)
    request = diffusion.Request(count=8, seed=3)
    steps, output = finish(diffusion.run(Session(bundle, threads=1), request))
    assert [step.kind for step in steps] == ["denoise"] * 160
    assert sum(step.units for step in steps) == 8 and steps[19].units == 1
    assert output.array.shape == (8, 16, 16, 1) and output.array.dtype == np.float32
    assert abs(output.array.mean() - MEAN) < 0.05 and abs(output.array.std() - STD) < 0.05


def test_one_step_answers_with_the_graph_itself(tmp_path):
    bundle = onnx_file.export(denoiser(tmp_path / "tiny.onnx"), tmp_path / "b")
    session = Session(bundle, threads=1)
    steps, output = finish(diffusion.run(session, diffusion.Request(conditions={"tilt": 0.25})))
    assert len(steps) == 1 and output.media == "image"
    x = np.random.Generator(np.random.PCG64([0, 0])).standard_normal((1, 1, 16, 16), np.float32)
    feeds = {"noisy": x * np.float32(80), "sigma": np.float32([80]), "tilt": np.float32([0.25])}
    assert np.array_equal(output.array[0, :, :, 0], session.run("model", feeds)[0][0, 0])


def test_a_sample_is_the_same_whatever_the_count(tmp_path):
    bundle = onnx_file.export(denoiser(tmp_path / "tiny.onnx"), tmp_path / "b", steps=3)
    session = Session(bundle, threads=1)
    one, three = (
        finish(diffusion.run(session, diffusion.Request(count=count, seed=5)))[1].array
        for count in (1, 3)
    )
    assert np.array_equal(one[0], three[0]) and not np.array_equal(three[0], three[1])


@pytest.mark.parametrize(
    "options, text",
    [
        ({"count": 0}, "count is 0, expected 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0, expected 1 or more"),
        ({"sampler": "plms"}, "sampler 'plms' is unknown"),
    ],
)
def test_requests_that_cannot_be_met_are_refused(options, text):
    with pytest.raises(RequestError, match=text):
        diffusion.Request(**options)


@pytest.mark.parametrize(
    "conditions, text",
    [
        ({"height": 1}, "'height' is unknown: expected one of tilt"),
        ({"tilt": 1.5}, "tilt is 1.5, expected 0 to 1"),
        ({"tilt": float("nan")}, "expected a number"),
    ],
)
def test_conditions_are_checked_against_the_model(tmp_path, conditions, text):
    bundle = onnx_file.export(denoiser(tmp_path / "tiny.onnx"), tmp_path / "b")
    with pytest.raises(RequestError, match=text):
        next(diffusion.run(Session(bundle), diffusion.Request(conditions=conditions)))


def test_more_steps_than_a_timestep_model_has_are_refused(tmp_path):
    path = gaussian_denoiser(tmp_path / "gauss.onnx", 0, 1)
    import onnx

    model = onnx.load(path)
    model.graph.input[1].name = "timestep"
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = "timestep" if name == "sigma" else name
    onnx.save(model, path)
    bundle = onnx_file.export(path, tmp_path / "b")
    assert bundle.config["prediction"] == "epsilon" and bundle.config["steps"] == 20
    with pytest.raises(RequestError, match="at most the 1000"):
        next(diffusion.run(Session(bundle), diffusion.Request(steps=1001)))
