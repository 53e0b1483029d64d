"""Text to image in three parts: vectors into a denoiser of latents, and those into a decoder."""

import json

import numpy as np
import pytest
import tiny_bundles

from leangen import pipeline
from leangen.bundle import open_bundle
from leangen.engine import Engine
from leangen.errors import RequestError
from leangen.exporters import onnx_file
from leangen.families import diffusion, imaging, oneshot
from leangen.session import Session

SHAPE = [4, 2, 2]
DRAW = """
[inputs.text]
[inputs.count]
default = 1
[parts.reader]
model = "reader"
request = {{ prompt = "{{input.text}}" }}
[parts.sketch]
model = "{sketch}"
request = {{ count = "{{input.count}}", conditions = {{ {condition} = "{{reader.{vectors}}}" }} }}
[parts.picture]
model = "{picture}"
request = {{ latent = "{{sketch.latent}}" }}
"""
PARTS = {"sketch": "sketch", "picture": "picture", "condition": "text", "vectors": "vectors"}


def graph(text, path, **weights):
    return tiny_bundles._graph(text, path, **weights)


def sketch(folder, width=64):
    """Its answer for one text differs from that for another."""
    text = f"""
    denoiser (float[b, 4, 2, 2] sample, int64[b] timestep, float[b, {width}] text)
        => (float[b, 4, 2, 2] v) {{
        m = MatMul (text, w0)
        shape = Constant <value = int64[4] {{-1, 4, 2, 2}}> ()
        told = Reshape (m, shape)
        t = Cast <to = 1> (timestep)
        zero = Constant <value = float {{0.0}}> ()
        nothing = Mul (t, zero)
        places = Constant <value = int64[3] {{1, 2, 3}}> ()
        late = Unsqueeze (nothing, places)
        h = Add (sample, told)
        a = Add (h, late)
        v = Conv (a, w1)
    }}"""
    path = graph(text, folder / "sketch.onnx", w0=(width, 16), w1=(4, 4, 1, 1))
    entry = {"min": None, "max": None, "default": 0, "unconditional": 0, "length": 1.0}
    options = {"prediction": "v", "steps": 2, "latents": True, "guidance": 2.0}
    return onnx_file.export(path, folder / "bundle", conditions={"text": entry}, **options)


def picture(folder, shape=SHAPE):
    channels, height, width = shape
    text = f"""
    decoder (float[b, {channels}, {height}, {width}] latent)
        => (float[b, 1, {height}, {width}] y) {{
        y = Conv (latent, w0)
    }}"""
    path = graph(text, folder / "picture.onnx", w0=(1, channels, 1, 1))
    return onnx_file.export(path, folder / "bundle", range=[-1.0, 1.0])


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("parts")
    made = {
        "reader": tiny_bundles.embedding(folder / "reader"),
        "sketch": sketch(folder / "sketch"),
        "narrow": sketch(folder / "narrow", width=48),
        "picture": picture(folder / "picture"),
        "wide": picture(folder / "wide", [4, 4, 4]),
        "turned": picture(folder / "turned", [2, 4, 2]),
    }
    return {name: Session(open_bundle(bundle.path), threads=1) for name, bundle in made.items()}


@pytest.fixture
def load(bundles, tmp_path):
    def load(**parts):
        path = tmp_path / "draw.toml"
        path.write_text(DRAW.format(**PARTS | parts))
        return pipeline.load(path, lambda name: Engine(bundles[name], baseline_s=0))

    return load


def finish(steps):
    while True:
        try:
            next(steps)
        except StopIteration as stop:
            return stop.value


def test_a_text_decides_what_is_drawn_and_the_parts_add_up(load):
    made = load()
    result, other = made.generate("w1 w2", count=2), made.generate("w3")
    assert result.array.shape == (2, 2, 2, 1)
    assert not np.allclose(result.array[0], result.array[1])
    assert not np.allclose(result.array[0], other.array[0])
    receipts = [part.receipt for part in result.parts.values()]
    assert sum(r.energy.gross_uj or 0 for r in receipts) == (result.receipt.energy.gross_uj or 0)
    assert receipts[1].request["conditions"] == {"text": "64 numbers"}
    json.dumps(result.receipt.to_json())


def test_the_vectors_reach_the_denoiser_as_the_encoder_gave_them(load, bundles):
    result = load().generate("w1 w2")
    vector = result.parts["reader"].array
    request = diffusion.Request(conditions={"text": vector})
    latent = finish(diffusion.run(bundles["sketch"], request))
    assert latent.media == "table" and latent.array.shape == (1, 16)
    assert np.array_equal(latent.array, result.parts["sketch"].array)
    decoded = finish(oneshot.run(bundles["picture"], oneshot.Request(latent=latent.array)))
    assert np.array_equal(decoded.array, result.array)


@pytest.mark.parametrize(
    ("parts", "reason"),
    [
        (
            {"picture": "wide"},
            r"parts.picture.latent: \{sketch.latent\}: the latent of sketch \(sketch:fp32\) has "
            r"shape \[\?, 4, 2, 2\], expected \[\?, 4, 4, 4\] \(picture:fp32\)",
        ),
        ({"picture": "turned"}, r"has shape \[\?, 4, 2, 2\], expected \[\?, 2, 4, 2\]"),
        (
            {"sketch": "narrow"},
            r"parts.sketch.conditions.text: \{reader.vectors\}: the vectors of reader .* has shape "
            r"\[\?, 64\], expected \[\?, 48\]",
        ),
        ({"condition": "words"}, "takes no part's output as conditions.words: it takes .*text"),
        ({"vectors": "text"}, "gives no 'text': it gives vectors"),
    ],
)
def test_parts_that_do_not_fit_are_refused_with_the_reason(load, parts, reason):
    with pytest.raises(RequestError, match=reason):
        load(**parts)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (np.ones((2, 64)) / 8, "condition text is 128 numbers, expected a number or 64"),
        ([3.0] * 64, "condition text has length 24, expected vectors of length 1"),
        ([float("nan")] * 64, "condition text is nan, expected a number"),
    ],
)
def test_vectors_that_the_model_was_not_trained_with(bundles, text, reason):
    with pytest.raises(RequestError, match=reason):
        finish(diffusion.run(bundles["sketch"], diffusion.Request(conditions={"text": text})))


@pytest.mark.parametrize("shape", [(1, 15), (8,), (1, 32), (2, 4, 2)])
def test_latents_of_another_shape_are_refused(bundles, shape):
    request = oneshot.Request(latent=np.zeros(shape))
    with pytest.raises(RequestError, match=r"expected finite numbers \[n, 4, 2, 2\]"):
        finish(oneshot.run(bundles["picture"], request))


def test_calibration_shows_directions_of_the_length_that_vectors_have(bundles):
    for request in diffusion.calibration_requests(bundles["sketch"]):
        fed = imaging.condition_feeds(bundles["sketch"].bundle.config, request.conditions)
        assert fed["text"].shape == (1, 64) and np.isclose(np.linalg.norm(fed["text"]), 1)


def upscaler(folder):
    """Its clean sample is the small picture, enlarged."""
    text = """
    upscaler (float[b, 1, 8, 8] sample, int64[b] timestep, float[b, 1, 8, 8] small,
              int64[b] augmentation) => (float[b, 1, 8, 8] y) {
        t = Add (timestep, augmentation)
        c = Cast <to = 1> (t)
        zero = Constant <value = float {0.0}> ()
        n = Mul (c, zero)
        places = Constant <value = int64[3] {1, 2, 3}> ()
        u = Unsqueeze (n, places)
        s = Mul (sample, zero)
        k = Add (small, s)
        y = Add (k, u)
    }"""
    noise = {"condition": "augmentation", "schedule": {"kind": "cosine", "timesteps": 1000}}
    return onnx_file.export(
        graph(text, folder / "up.onnx"),
        folder / "bundle",
        prediction="sample",
        steps=2,
        upscale={"input": "small", "shape": [1, 4, 4], "resize": True, "noise": noise},
        range=[-1.0, 1.0],
    )


def test_several_pictures_are_enlarged_one_by_one(tmp_path):
    session = Session(upscaler(tmp_path), threads=1)
    assert "small" not in session.bundle.config["conditions"]
    ramp = np.linspace(-1, 1, 4, dtype=np.float32)
    pictures = np.stack([np.tile(ramp[None, :, None], (4, 1, 1)), np.ones((4, 4, 1), np.float32)])
    large = finish(diffusion.run(session, diffusion.Request(image=pictures))).array
    assert large.shape == (2, 8, 8, 1)
    expected = np.stack([np.tile(np.linspace(-1, 1, 8), (8, 1)), np.ones((8, 8))])
    assert np.abs(large[..., 0] - expected).max() < 0.2  # a little noise is added
    alone = finish(diffusion.run(session, diffusion.Request(image=pictures[0]))).array
    assert np.array_equal(alone[0], large[0])
    with pytest.raises(RequestError, match="count is 3, but there are 2 images to enlarge"):
        finish(diffusion.run(session, diffusion.Request(image=pictures, count=3)))
    with pytest.raises(RequestError, match=r"image has shape \[8, 8, 1\], expected \[4, 4, 1\]"):
        finish(diffusion.run(session, diffusion.Request(image=np.ones((1, 8, 8, 1)))))
