"""Diffusion and one-shot models: what a seed, a count, steps and conditions mean."""

import numpy as np
import pytest
import tiny_bundles
from flow_models import drain

from leangen.errors import RequestError
from leangen.exporters import onnx_file
from leangen.families import diffusion, imaging, oneshot
from leangen.samplers import SAMPLERS, schedules
from leangen.session import Session

MODULES = {"diffusion": diffusion, "oneshot": oneshot}
both = pytest.mark.parametrize("family", MODULES)


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    """Sessions of the tiny bundles by family."""
    folder = tmp_path_factory.mktemp("images")
    return {name: Session(tiny_bundles.BUILDERS[name](folder / name)) for name in MODULES}


@pytest.fixture(scope="module")
def timed(tmp_path_factory):
    """A model that is told the timestep, trained with 50 of them: it predicts noise of 0.1 x."""
    text = """
    denoiser (float[b, 1, 4, 4] sample, int64[b] timestep) => (float[b, 1, 4, 4] y) {
        tenth = Constant <value = float {0.1}> ()
        zero = Constant <value = float {0.0}> ()
        axes = Constant <value = int64[3] {1, 2, 3}> ()
        t = Cast <to = 1> (timestep)
        u = Unsqueeze (t, axes)
        none = Mul (u, zero)
        s = Mul (sample, tenth)
        y = Add (s, none)
    }"""
    folder = tmp_path_factory.mktemp("timed")
    schedule = {"kind": "linear", "timesteps": 50, "beta_start": 1e-3, "beta_end": 0.2}
    path = tiny_bundles._graph(text, folder / "timed.onnx")
    return Session(onnx_file.export(path, folder / "bundle", schedule=schedule, steps=5))


def draw(session, **options):
    """Steps and the images of one request."""
    module = MODULES[session.bundle.family]
    return drain(module.run(session, module.Request(**options)))


@both
@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"count": 0}, "count is 0, expected 1 or more"),
        ({"count": -2}, "count is -2, expected 1 or more"),
        ({"seed": -1}, "seed is -1, expected 0 or more"),
    ],
)
def test_requests_of_nothing_are_refused(family, options, text):
    with pytest.raises(RequestError, match=text):
        MODULES[family].Request(**options)


@pytest.mark.parametrize("steps", [0, -1])
def test_at_least_one_step_is_needed(steps):
    with pytest.raises(RequestError, match=f"steps is {steps}, expected 1 or more"):
        diffusion.Request(steps=steps)


def test_an_unknown_sampler_is_refused_before_anything_runs():
    with pytest.raises(RequestError, match="'plms' is unknown: expected one of consistency"):
        diffusion.Request(sampler="plms")


def test_more_steps_than_were_trained_are_refused(timed):
    with pytest.raises(RequestError, match="steps is 51, expected at most the 50"):
        draw(timed, steps=51)
    assert len(draw(timed, steps=50)[0]) == 50


def test_an_unknown_condition_lists_the_known_ones(session):
    with pytest.raises(RequestError, match="'wet' is unknown: expected one of wetness"):
        draw(session["diffusion"], conditions={"wet": 0.5})
    with pytest.raises(RequestError, match="'wet' is unknown: expected one of none"):
        draw(session["oneshot"], conditions={"wet": 0.5})


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (-0.1, "wetness is -0.1, expected 0 to 1"),
        (1.5, "wetness is 1.5, expected 0 to 1"),
        (float("nan"), "wetness is nan, expected a number"),
        ("much", "wetness is 'much', expected a number"),
    ],
)
def test_a_condition_out_of_its_range_is_refused(session, value, text):
    with pytest.raises(RequestError, match=text):
        draw(session["diffusion"], conditions={"wetness": value})


def test_a_condition_may_be_open_at_one_end():
    entry = {"min": 0, "max": None, "default": 0, "shape": [1], "dtype": "int64"}
    config = {"conditions": {"label": entry}}
    assert imaging.condition_feeds(config, {"label": 7})["label"].tolist() == [7]
    with pytest.raises(RequestError, match="label is -1, expected 0 or more"):
        imaging.condition_feeds(config, {"label": -1})
    entry |= {"min": None, "max": 3}
    with pytest.raises(RequestError, match="label is 4, expected 3 or less"):
        imaging.condition_feeds(config, {"label": 4})


def test_a_condition_that_is_not_chosen_has_its_default(session):
    given = draw(session["diffusion"], conditions={"wetness": 0.5})[1].array
    np.testing.assert_array_equal(draw(session["diffusion"])[1].array, given)
    other = draw(session["diffusion"], conditions={"wetness": 0.9})[1].array
    assert not np.array_equal(other, given)


@both
def test_a_sample_depends_on_its_seed_and_place_alone(session, family):
    three = draw(session[family], seed=5, count=3)[1].array
    one = draw(session[family], seed=5)[1].array
    np.testing.assert_array_equal(one[0], three[0])
    np.testing.assert_array_equal(draw(session[family], seed=5, count=3)[1].array, three)
    assert not np.array_equal(three[0], three[1])
    assert not np.array_equal(draw(session[family], seed=6)[1].array[0], three[0])


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_samples_do_not_depend_on_the_count_in_any_sampler(session, sampler):
    options = {"seed": 1, "steps": 3, "sampler": sampler}
    two = draw(session["diffusion"], count=2, **options)[1].array
    np.testing.assert_array_equal(draw(session["diffusion"], **options)[1].array[0], two[0])


@both
@pytest.mark.parametrize("count", [1, 3])
def test_images_are_float32_with_the_channel_last(session, family, count):
    output = draw(session[family], count=count)[1]
    assert output.array.shape == (count, 8, 8, 1)
    assert output.array.dtype == np.float32
    assert output.media == "image"
    assert set(output.extra) == {"range", "render"}


@pytest.mark.parametrize(("count", "steps"), [(1, 1), (1, 4), (3, 2)])
def test_steps_add_up_to_the_samples(session, count, steps):
    seen, _ = draw(session["diffusion"], count=count, steps=steps)
    assert {step.kind for step in seen} == {"denoise"}
    assert [step.units for step in seen] == ([0.0] * (steps - 1) + [1.0]) * count


def test_oneshot_takes_one_step_per_image(session):
    seen, _ = draw(session["oneshot"], count=3)
    assert [(step.kind, step.units) for step in seen] == [("decode", 1)] * 3


def test_steps_are_yielded_as_they_are_done(session):
    """The first step is there before the second is computed."""
    calls = []

    class Counting(Session):
        def run(self, role, feeds, outputs=None):
            calls.append(role)
            return super().run(role, feeds, outputs)

    counting = Counting(session["diffusion"].bundle)
    run = diffusion.run(counting, diffusion.Request(steps=3, sampler="euler"))
    for done in range(1, 4):
        next(run)
        assert len(calls) == done


@pytest.mark.parametrize("sampler", ["ddim", "euler"])
def test_a_noise_predicting_model_is_sampled_as_written_out_by_hand(timed, sampler):
    """DDIM's own variables (arXiv 2010.02502, eq. 12), for a model that answers 0.1 x."""
    betas = np.linspace(1e-3, 0.2, 50)
    kept = np.cumprod(1 - betas)
    places = [49, 37, 24, 12, 0]  # 5 of 50, evenly, rounded to even
    sigmas = schedules.vp_sigmas(timed.bundle.config["noise_level"]["schedule"])
    noise = imaging.generator(3, 0).standard_normal((1, 1, 4, 4), np.float32).astype(np.float64)
    x = noise * sigmas[-1] * np.sqrt(kept[49])  # the sampler starts at sigma * noise
    for place, following in zip(places, [*places[1:], None], strict=True):
        eps = 0.1 * x
        clean = (x - np.sqrt(1 - kept[place]) * eps) / np.sqrt(kept[place])
        after = 1.0 if following is None else kept[following]
        x = np.sqrt(after) * clean + np.sqrt(1 - after) * eps
    ours = draw(timed, seed=3, sampler=sampler)[1].array
    np.testing.assert_allclose(ours[..., 0], x[:, 0], rtol=1e-4, atol=1e-5)


@both
def test_calibration_spans_the_conditions(session, family):
    module = MODULES[family]
    requests = module.calibration_requests(session[family])
    assert len({request.seed for request in requests}) == len(requests) == 3
    if family == "diffusion":
        assert [request.conditions["wetness"] for request in requests] == [0.5, 0.0, 1.0]
