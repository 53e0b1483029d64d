"""The diffusion family end to end, on tiny models whose answers are known."""

import struct

import numpy as np
import onnx
import pytest
from image_models import denoiser, gaussian_denoiser, model, value
from onnx import TensorProto, helper
from PIL import Image

from leangen.errors import RequestError, UnsupportedError
from leangen.exporters import onnx_file
from leangen.families import diffusion, guidance, imaging
from leangen.samplers import SAMPLERS
from leangen.session import Session

MEAN, STD, TOP = 0.7, 0.5, 20.0
ZERO_SNR = {
    "kind": "scaled_linear",
    "timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "zero_terminal_snr": True,
}


def finish(generator):
    steps = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return steps, stop.value


def draw(bundle, **options):
    """The images of a request."""
    return finish(diffusion.run(Session(bundle, threads=1), diffusion.Request(**options)))[1].array


def constant_model(path, batch="b", level="timestep"):
    """What it predicts is `label` everywhere, whatever it is shown: `label` 9 stands for none."""
    nodes = [
        helper.make_node("Mul", ["sample", "zero"], ["nothing"]),
        helper.make_node("Unsqueeze", ["label", "places"], ["map"]),
        helper.make_node("Cast", [level], ["level"], to=TensorProto.FLOAT),
        helper.make_node("Mul", ["level", "zero"], ["level_nothing"]),
        helper.make_node("Unsqueeze", ["level_nothing", "places"], ["level_map"]),
        helper.make_node("Add", ["nothing", "map"], ["sum"]),
        helper.make_node("Add", ["sum", "level_map"], ["out"]),
    ]
    shape = [batch, 1, 8, 8]
    inputs = [value("sample", shape), value(level, [batch], TensorProto.INT64)]
    inputs.append(value("label", [batch]))
    constants = {"zero": np.float32(0), "places": np.array([1, 2, 3])}
    onnx.save(model(nodes, inputs, [value("out", shape)], constants), path)
    return path


def labelled(tmp_path, batch="b", **options):
    """A bundle of it: a sample of label y is y everywhere."""
    path = constant_model(tmp_path / "constant.onnx", batch)
    label = {"min": 0.0, "max": 5.0, "default": 1.0, "unconditional": 9.0}
    options = {
        "prediction": "sample",
        "conditions": {"label": label},
        **options,
    }
    return onnx_file.export(path, tmp_path / "labelled", shape=[1, 8, 8], **options)


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
        ({"count": 0}, "count is 0, expected a whole number, 1 or more"),
        ({"seed": -1}, "seed is -1"),
        ({"steps": 0}, "steps is 0, expected a whole number, 1 to 10000"),
        ({"sampler": "plms"}, "sampler 'plms' is unknown"),
        ({"guidance": float("nan")}, "guidance is nan, expected a number"),
        ({"guidance_rescale": 1.5}, "guidance_rescale is 1.5, expected 0 to 1"),
        ({"strength": 0.5}, "strength is given without an image"),
        ({"mask": [[1.0]]}, "mask is given without an image"),
        ({"image": [[1.0]], "strength": 0.0}, "strength is 0.0, expected more than 0, up to 1"),
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
    model = onnx.load(path)
    model.graph.input[1].name = "timestep"
    for node in model.graph.node:
        for place, name in enumerate(node.input):
            node.input[place] = "timestep" if name == "sigma" else name
    onnx.save(model, path)
    bundle = onnx_file.export(path, tmp_path / "b")
    assert bundle.config["prediction"] == "epsilon" and bundle.config["steps"] == 20
    with pytest.raises(RequestError, match="at most 1000 of the 1000"):
        next(diffusion.run(Session(bundle), diffusion.Request(steps=1001)))


# Levels and predictions


@pytest.mark.parametrize("sampler", SAMPLERS)
@pytest.mark.parametrize(
    "options",
    [
        {"prediction": "v", "schedule": ZERO_SNR, "spacing": "trailing"},
        {"prediction": "epsilon", "spacing": "karras"},
        {"prediction": "flow", "shift": 3.0},
    ],
    ids=["v", "epsilon", "flow"],
)
def test_every_sampler_runs_models_of_every_kind(tmp_path, sampler, options):
    bundle = labelled(tmp_path, **options)
    first, again = (draw(bundle, sampler=sampler, steps=5, seed=3) for _ in range(2))
    assert first.shape == (1, 8, 8, 1) and first.dtype == np.float32
    assert np.isfinite(first).all() and np.array_equal(first, again)


def test_a_flow_model_of_constant_velocity_moves_the_noise_by_it(tmp_path):
    """dx/dt = y from t = 1 to 0, in any number of steps."""
    bundle = labelled(tmp_path, prediction="flow", sampler="euler")
    start = imaging.generator(4, 0).standard_normal((1, 1, 8, 8), np.float32)
    for steps in (1, 7):
        ours = draw(bundle, conditions={"label": 2.0}, seed=4, steps=steps)
        np.testing.assert_allclose(ours[..., 0], start[:, 0] - 2, atol=1e-5)


def test_epsilon_of_pure_noise_is_refused_at_export(tmp_path):
    path = constant_model(tmp_path / "constant.onnx")
    with pytest.raises(UnsupportedError, match="zero signal-to-noise ratio: expected v or sample"):
        onnx_file.export(path, tmp_path / "b", shape=[1, 8, 8], schedule=ZERO_SNR)


# Guidance


@pytest.mark.parametrize("batch", ["b", 1], ids=["batched", "sequential"])
def test_guidance_goes_from_the_unconditional_answer_past_the_conditional_one(tmp_path, batch):
    bundle = labelled(tmp_path, batch)
    for scale in (0.0, 1.0, 3.0):
        ours = draw(bundle, conditions={"label": 2.0}, guidance=scale)
        np.testing.assert_allclose(ours, 9 + scale * (2 - 9), rtol=1e-6)


def test_both_answers_come_from_one_run_where_the_graph_takes_a_batch(tmp_path):
    for place, (batch, runs) in enumerate([("b", 4), (1, 8)]):
        (tmp_path / str(place)).mkdir()
        session = Session(labelled(tmp_path / str(place), batch), threads=1)
        seen = []
        run = session.run

        def counted(role, feeds, outputs=None, run=run, seen=seen):
            seen.append(feeds)
            return run(role, feeds, outputs)

        session.run = counted
        finish(diffusion.run(session, diffusion.Request(guidance=2.0, steps=4)))
        assert len(seen) == runs


def test_a_models_own_guidance_is_the_default(tmp_path):
    bundle = labelled(tmp_path, guidance=3.0)
    assert draw(bundle, conditions={"label": 2.0}).mean() == pytest.approx(9 - 3 * 7)
    assert draw(bundle, conditions={"label": 2.0}, guidance=1.0).mean() == pytest.approx(2)


def test_rescaled_guidance_is_equations_15_and_16():
    conditional, unconditional = np.random.default_rng(0).standard_normal((2, 1, 3, 8, 8))
    guided = unconditional + 7.5 * (conditional - unconditional)
    rescaled = guided * conditional.std() / guided.std()
    ours = guidance.combine(conditional, unconditional, 7.5, 0.7)
    np.testing.assert_allclose(ours, 0.7 * rescaled + 0.3 * guided, rtol=1e-12)
    full = guidance.combine(conditional, unconditional, 7.5, 1.0)
    assert full.std() == pytest.approx(conditional.std())


def test_guidance_without_a_condition_to_guide_by_is_refused(tmp_path):
    bundle = onnx_file.export(denoiser(tmp_path / "tiny.onnx"), tmp_path / "b")
    with pytest.raises(RequestError, match=r"guidance is 3, but no condition .*conditions: tilt"):
        draw(bundle, guidance=3.0)


# Starting from an image


def gaussian(tmp_path, **options):
    path = gaussian_denoiser(tmp_path / "gauss.onnx", MEAN, STD)
    options = {"steps": 20, "sampler": "ddim", "sigma_max": TOP, **options}
    return onnx_file.export(path, tmp_path / "b", **options)


def ramp():
    """An image [16, 16, 1]."""
    return np.linspace(-1, 1, 256, dtype=np.float32).reshape(16, 16, 1)


def test_the_weaker_the_strength_the_nearer_the_image_and_the_fewer_the_steps(tmp_path):
    session = Session(gaussian(tmp_path), threads=1)
    distances = []
    for strength in (0.1, 0.5, 1.0):
        request = diffusion.Request(image=ramp(), strength=strength, seed=2)
        steps, output = finish(diffusion.run(session, request))
        assert len(steps) == round(20 * strength) and sum(step.units for step in steps) == 1
        distances.append(np.abs(output.array[0] - ramp()).mean())
    assert distances[0] < 0.05 and distances == sorted(distances)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_inpainting_keeps_the_image_where_the_mask_is_black(tmp_path, sampler):
    mask = np.zeros((16, 16), np.float32)
    mask[4:12, 4:12] = 1
    drawn = draw(gaussian(tmp_path), image=ramp(), mask=mask, sampler=sampler, seed=1)[0]
    np.testing.assert_allclose(drawn[mask == 0], ramp()[mask == 0], atol=1e-5)
    assert np.abs(drawn - ramp())[mask == 1].mean() > 0.1


def test_pictures_and_arrays_on_disk_are_read_alike(tmp_path):
    pixels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    Image.fromarray(pixels).save(tmp_path / "p.png")
    np.save(tmp_path / "p.npy", pixels[..., None] / 255 * 2 - 1)
    bundle = gaussian(tmp_path, range=[-1.0, 1.0])
    png, npy = (
        draw(bundle, image=str(tmp_path / f"p.{kind}"), strength=0.2) for kind in ("png", "npy")
    )
    np.testing.assert_allclose(png, npy, atol=1e-5)
    with pytest.raises(RequestError, match="image goes from 0 to 255, expected .* -1 .* to 1 "):
        draw(bundle, image=pixels, strength=0.2)


def test_images_and_masks_that_do_not_fit_are_refused(tmp_path):
    bundle = gaussian(tmp_path)
    (tmp_path / "bad.png").write_bytes(b"no picture")
    (tmp_path / "bad.npy").write_bytes(b"no array")
    (tmp_path / "empty.npy").write_bytes(b"")
    Image.new("L", (16, 16)).save(tmp_path / "huge.bmp")
    whole = (tmp_path / "huge.bmp").read_bytes()
    told = whole[:18] + struct.pack("<ii", 30_000, 30_000) + whole[26:]
    (tmp_path / "huge.bmp").write_bytes(told)
    Image.fromarray(np.zeros((16, 16), np.uint8)).save(tmp_path / "p.png")
    image = ramp()
    for options, text in [
        ({"image": image}, "image is given alone: give strength .* or a mask"),
        ({"prompt": "a cat"}, "prompt is given, but gauss reads no text"),
        ({"image": image[:8], "strength": 0.5}, r"image has shape \[8, 16, 1\], expected \[16, 16"),
        ({"image": image, "mask": image}, r"mask has shape \[16, 16, 1\], expected \[16, 16\]"),
        ({"image": image, "mask": image[..., 0]}, "mask goes from -1 to 1, expected 0"),
        ({"image": image * np.nan, "strength": 0.5}, "image holds NaN"),
        ({"image": "many words", "strength": 0.5}, "does not say which values"),
        ({"image": [["a"]], "strength": 0.5}, "image is not numeric"),
        ({"image": str(tmp_path / "none.npy"), "strength": 0.5}, "cannot read image .*No such"),
        ({"image": str(tmp_path / "bad.npy"), "strength": 0.5}, "cannot read image .* as .npy"),
        ({"image": str(tmp_path / "p.png"), "strength": 0.5}, "does not say which values"),
        ({"image": str(tmp_path / "empty.npy"), "strength": 0.5}, "cannot read image .* as .npy"),
        ({"image": image, "mask": str(tmp_path / "bad.png")}, "cannot read .*bad.png as a picture"),
        ({"image": image, "mask": str(tmp_path / "huge.bmp")}, "cannot read .*huge.bmp as a pict"),
        ({"image": image, "strength": 0.01}, "less than one step: expected 0.05 or more"),
    ]:
        with pytest.raises(RequestError, match=text):
            draw(bundle, **options)
