"""Pixels and sound one after another: ImageGPT against transformers, WaveNet against torch."""

from __future__ import annotations

import json

import autoregressive_fixtures
import draws
import numpy as np
import pytest

from leangen import exporters
from leangen.engine import Engine
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters import imagegpt, wavenet
from leangen.families import image_tokens, waveform
from leangen.quantize import quantize
from leangen.session import Session


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    return Session(autoregressive_fixtures.image(tmp_path_factory.mktemp("image")), threads=1)


@pytest.fixture(scope="module")
def sounds(tmp_path_factory):
    return Session(autoregressive_fixtures.sound(tmp_path_factory.mktemp("sound")), threads=1)


def finish(generator):
    steps = []
    while True:
        try:
            steps.append(next(generator))
        except StopIteration as stop:
            return steps, stop.value


def imagegpt_folder(folder):
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    torch.manual_seed(0)
    config = transformers.ImageGPTConfig(**autoregressive_fixtures.IMAGEGPT)
    model = transformers.ImageGPTForCausalImageModeling(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            spread = 1 / np.sqrt(parameter.shape[-1]) if parameter.dim() > 1 else 0.3
            base = 1.0 if "ln_" in name else 0.0
            parameter.copy_(base + torch.randn_like(parameter) * spread)
    model.save_pretrained(folder)
    clusters = np.random.default_rng(0).uniform(-1, 1, (32, 3)).round(3).tolist()
    (folder / "preprocessor_config.json").write_text(json.dumps({"clusters": clusters}))
    return torch, model, np.float32(clusters)


def test_imagegpt_is_transformers(tmp_path):
    torch, model, clusters = imagegpt_folder(tmp_path / "saved")
    assert exporters.find(tmp_path / "saved") is imagegpt
    session = Session(exporters.export(tmp_path / "saved", tmp_path / "bundle"), threads=1)
    tokens = draws.rng().integers(0, 32, 36).tolist()
    with torch.no_grad():
        expected = model(torch.tensor([[32, *tokens[:-1]]])).logits[0].numpy()
    got = image_tokens.logits(session, tokens)
    np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    steps, output = finish(image_tokens.run(session, image_tokens.Request(temperature=0)))
    theirs = model.generate(torch.tensor([[32]]), max_new_tokens=35, do_sample=False)[0, 1:]
    drawn = [token for step in steps for token in step.tokens]
    assert drawn[:35] == theirs.tolist()
    np.testing.assert_array_equal(output.array[0], clusters[drawn].reshape(6, 6, 3))
    for scheme in ("int8", "int4"):
        low = quantize(session.bundle, scheme, tmp_path / scheme)
        result = Engine(Session(low, threads=1), baseline_s=0).generate()
        assert result.receipt.units.count == 36


def test_imagegpt_without_its_colours_is_refused(tmp_path):
    imagegpt_folder(tmp_path / "saved")
    said = tmp_path / "saved" / "preprocessor_config.json"
    said.write_text("{}")
    with pytest.raises(SourceError, match=r"clusters of shape \[0\], expected \[32, 3\]"):
        exporters.export(tmp_path / "saved", tmp_path / "out")
    said.write_text(json.dumps({"clusters": [[0, 0, 0]] * 32}))
    config = tmp_path / "saved" / "config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"n_positions": 35}))
    with pytest.raises(UnsupportedError, match="draws 35 pixels, expected a square"):
        exporters.export(tmp_path / "saved", tmp_path / "out")


def test_an_image_is_completed_from_its_top(images):
    colours = image_tokens.colours(images)
    tokens = np.random.default_rng(0).integers(0, 32, 36)
    image = colours[tokens].reshape(6, 6, 3)
    assert image_tokens.nearest(images, image + 1e-3) == tokens.tolist()
    for strength, rows in ((0.5, 3), (0.0, 6), (1.0, 0)):
        request = image_tokens.Request(image=image, strength=strength, seed=1)
        steps, output = finish(image_tokens.run(images, request))
        np.testing.assert_array_equal(output.array[0, :rows], image[:rows])
        assert sum(step.units for step in steps) == (6 - rows) * 6


def test_image_i_of_a_seed_is_image_0_of_the_seed_after(images):
    both = finish(image_tokens.run(images, image_tokens.Request(count=2, seed=4)))[1].array
    second = finish(image_tokens.run(images, image_tokens.Request(seed=5)))[1].array
    np.testing.assert_array_equal(both[1], second[0])
    assert not np.array_equal(both[0], both[1])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"strength": 2}, "strength is 2"),
        ({"count": 0}, "count is 0"),
        ({"top_p": 0}, "top_p is 0"),
        ({"image": np.zeros((5, 6, 3))}, "image has shape"),
    ],
)
def test_bad_image_requests(images, options, told):
    with pytest.raises(RequestError, match=told):
        finish(image_tokens.run(images, image_tokens.Request(**options)))


@pytest.mark.parametrize(("kernel", "dilations"), [(2, (1, 2, 4, 1, 2)), (3, (1, 3, 9))])
def test_wavenet_is_torchs_convolutions(tmp_path, kernel, dilations):
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    safetensors = pytest.importorskip("safetensors.numpy")
    shape = wavenet.Shape(sample_rate_hz=800, levels=64, kernel=kernel, dilations=dilations)
    weights = autoregressive_fixtures.sound_weights(shape)
    del weights["skip_convs.1.bias"]  # biases are there or not
    folder = tmp_path / "saved"
    folder.mkdir()
    safetensors.save_file(weights, folder / "model.safetensors")
    said = {"model_type": "wavenet", "sample_rate_hz": 800, "levels": 64, "kernel": kernel}
    (folder / "config.json").write_text(json.dumps({**said, "dilations": dilations}))
    assert exporters.find(folder) is wavenet
    session = Session(exporters.export(folder, tmp_path / "bundle"), threads=1)
    tokens = draws.rng().integers(0, 64, 120).tolist()

    def conv(name, x, dilation=1):
        weight, bias = weights[f"{name}.weight"], weights.get(f"{name}.bias")
        x = torch.nn.functional.pad(x, ((weight.shape[-1] - 1) * dilation, 0))
        held = [None if a is None else torch.from_numpy(a).double() for a in (weight, bias)]
        return torch.nn.functional.conv1d(x, *held, dilation=dilation)

    hot = torch.nn.functional.one_hot(torch.tensor([[32, *tokens[:-1]]]), 64).double()
    x, skips = conv("start_conv", hot.mT), 0
    for layer, dilation in enumerate(dilations):
        y = torch.tanh(conv(f"filter_convs.{layer}", x, dilation))
        y = y * torch.sigmoid(conv(f"gate_convs.{layer}", x, dilation))
        skips = skips + conv(f"skip_convs.{layer}", y)
        x = x + conv(f"residual_convs.{layer}", y)
    y = conv("end_conv_1", torch.relu(skips))
    expected = conv("end_conv_2", torch.relu(y))[0].mT.numpy()
    scale = 1e-4 * max(1, np.abs(expected).max())
    np.testing.assert_allclose(waveform.logits(session, tokens), expected, atol=scale)
    states = waveform.silence(session.bundle.config)
    for row, token in zip(expected, [32, *tokens[:-1]], strict=True):  # one by one, remembered
        rows, states = waveform._fed(session, [token], states)
        np.testing.assert_allclose(rows[0], row, atol=scale)


def test_sound_has_its_length_and_is_mu_law(sounds):
    steps, output = finish(waveform.run(sounds, waveform.Request(seconds=0.55, seed=2)))
    assert output.array.shape == (440,)
    assert sum(step.units for step in steps) == pytest.approx(0.55)
    # G.711: each level is what compressing it gives back
    sound, mu = output.array.astype(np.float64), 63
    levels = (np.sign(sound) * np.log1p(mu * np.abs(sound)) / np.log1p(mu) + 1) / 2 * mu
    np.testing.assert_allclose(levels, output.tokens, atol=1e-4)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_sound_quantizes(sounds, tmp_path, scheme):
    low = quantize(sounds.bundle, scheme, tmp_path / scheme)
    result = Engine(Session(low, threads=1), baseline_s=0).generate(seconds=0.1)
    assert result.receipt.units.count == pytest.approx(0.1)
    assert np.isfinite(result.array).all()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"dilations": None}, "wrong type"),
        ({"dilations": []}, "no dilations"),
        ({"kernel": 1}, "a kernel of 2 or more"),
        ({"dilations": [1, 2, 4, 1, 1]}, r"filter_convs\.4\.weight is missing"),
        ({"levels": 32}, r"start_conv\.weight is \[32, 64, 1\], expected \[32, 32, 1\]"),
    ],
)
def test_descriptions_that_do_not_fit(tmp_path, change, told):
    safetensors = pytest.importorskip("safetensors.numpy")
    pytest.importorskip("ml_dtypes")
    weights = autoregressive_fixtures.sound_weights()
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    said = {"model_type": "wavenet", "sample_rate_hz": 800, "levels": 64, "dilations": [1, 2, 4, 1]}
    (tmp_path / "config.json").write_text(json.dumps(said | change))
    with pytest.raises(SourceError, match=told):
        exporters.export(tmp_path, tmp_path / "out")
    del said["levels"]
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(SourceError, match="lacks 'levels', which a wavenet has"):
        exporters.export(tmp_path, tmp_path / "out")


@pytest.mark.parametrize("options", [{"seconds": 0}, {"seconds": 1e9}, {"temperature": -1}])
def test_bad_sound_requests(options):
    with pytest.raises(RequestError):
        waveform.Request(**options)
