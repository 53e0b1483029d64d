"""Plain ONNX files as bundles: what their inputs say, and what is refused."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import TensorProto, helper
from tiny_bundles import _graph

from leangen.bundle import verify
from leangen.errors import LeangenError, SourceError, StorageError, UnsupportedError
from leangen.exporters import onnx_file


def graph(inputs, path, *, size="4, 4"):
    """A file with these float inputs, of which the first comes out again, twice as large."""
    first = inputs[0]
    shapes = {name: f"float[b, 1, {size}]" if name == first else "float[b]" for name in inputs}
    declared = ", ".join(f"{kind} {name}" for name, kind in shapes.items())
    return _graph(
        f"g ({declared}) => (float[b, 1, {size}] y) {{ y = Add ({first}, {first}) }}", path
    )


@pytest.mark.parametrize("sample", onnx_file.SAMPLE_NAMES)
@pytest.mark.parametrize("level", onnx_file.SIGMA_NAMES)
def test_a_noise_level_in_sigma_makes_a_one_step_denoiser(tmp_path, sample, level):
    bundle = onnx_file.export(graph([sample, level], tmp_path / "m.onnx"), tmp_path / "out")
    verify(bundle)
    config = bundle.config
    assert (bundle.name, bundle.family, bundle.scheme) == ("m", "diffusion", "fp32")
    assert config["sample"] == {"input": sample, "output": "y", "shape": [1, 4, 4]}
    level_config = {"input": level, "shape": [1], "dtype": "float32", "kind": "sigma"}
    assert config["noise_level"] == level_config | {"min": 0.002, "max": 80.0}
    assert (config["prediction"], config["sampler"], config["steps"]) == (
        "sample",
        "consistency",
        1,
    )


@pytest.mark.parametrize("level", onnx_file.TIMESTEP_NAMES)
def test_a_timestep_makes_a_model_of_noise(tmp_path, level):
    config = onnx_file.export(graph(["sample", level], tmp_path / "m.onnx"), tmp_path / "o").config
    assert config["noise_level"]["kind"] == "timestep"
    assert config["noise_level"]["schedule"]["timesteps"] == 1000
    assert (config["prediction"], config["sampler"], config["steps"]) == ("epsilon", "euler", 20)


@pytest.mark.parametrize("latent", onnx_file.LATENT_NAMES)
def test_a_latent_alone_makes_a_generator(tmp_path, latent):
    bundle = onnx_file.export(graph([latent], tmp_path / "m.onnx"), tmp_path / "out")
    assert bundle.family == "oneshot"
    assert bundle.config["latent"] == {"input": latent, "shape": [1, 4, 4], "kind": "normal"}


def test_letter_case_of_inputs_does_not_matter(tmp_path):
    bundle = onnx_file.export(graph(["Noisy", "Sigma"], tmp_path / "m.onnx"), tmp_path / "out")
    assert bundle.config["sample"]["input"] == "Noisy"


def test_every_other_input_is_a_condition(tmp_path):
    path = graph(["noisy", "sigma", "wetness", "height"], tmp_path / "m.onnx")
    given = {"wetness": {"min": -1.0, "max": 2.0, "default": 0.0}}
    conditions = onnx_file.export(path, tmp_path / "out", conditions=given).config["conditions"]
    small = {"shape": [1], "dtype": "float32"}
    assert conditions == {
        "wetness": {"min": -1.0, "max": 2.0, "default": 0.0} | small,
        "height": {"min": 0.0, "max": 1.0, "default": 0.5} | small,
    }


def test_options_are_kept(tmp_path):
    path = graph(["noisy", "sigma"], tmp_path / "m.onnx")
    options = {"prediction": "epsilon", "sampler": "heun", "steps": 7, "sigma_max": 5.0}
    config = onnx_file.export(
        path, tmp_path / "out", name="mine", range=[-1, 1], render="relief", **options
    ).config
    assert [config[key] for key in ("prediction", "sampler", "steps")] == ["epsilon", "heun", 7]
    assert (config["noise_level"]["max"], config["range"], config["render"]) == (
        5.0,
        [-1, 1],
        "relief",
    )


def refused(path, tmp_path, kind, match, **options):
    """The export raises one line of `kind` and leaves nothing behind."""
    before = sorted(tmp_path.iterdir())
    with pytest.raises(kind, match=match) as caught:
        onnx_file.export(path, tmp_path / "out", **options)
    assert isinstance(caught.value, LeangenError)
    assert "\n" not in str(caught.value)
    assert sorted(tmp_path.iterdir()) == before


@pytest.mark.parametrize("data", [b"PK\x03\x04 a wheel", b"text, not a graph\n" * 9, b"\xff" * 99])
def test_a_file_that_is_not_onnx_is_refused(tmp_path, data):
    path = tmp_path / "m.onnx"
    path.write_bytes(data)
    refused(path, tmp_path, SourceError, "is not an ONNX file, or is cut off: check")


def test_an_empty_file_is_refused(tmp_path):
    path = tmp_path / "m.onnx"
    path.write_bytes(b"")
    refused(path, tmp_path, SourceError, "m.onnx")


def test_a_file_cut_off_anywhere_is_refused(tmp_path):
    path = graph(["noisy", "sigma"], tmp_path / "m.onnx")
    whole = path.read_bytes()
    for length in range(1, len(whole), 7):
        path.write_bytes(whole[:length])
        refused(path, tmp_path, (SourceError, UnsupportedError), "m.onnx")


def test_a_missing_file_is_refused(tmp_path):
    refused(tmp_path / "none.onnx", tmp_path, SourceError, "is not a file: give the path")


def test_inputs_that_say_nothing_are_refused_with_their_names(tmp_path):
    path = graph(["tokens", "mask"], tmp_path / "m.onnx")
    refused(path, tmp_path, UnsupportedError, "has inputs tokens, mask: expected one named z")
    refused(path, tmp_path, UnsupportedError, "needs its noise level", family="diffusion")


def test_a_sample_of_open_size_needs_a_shape(tmp_path):
    path = graph(["noisy", "sigma"], tmp_path / "m.onnx", size="h, w")
    refused(path, tmp_path, UnsupportedError, "leaves its sizes open .*: give `shape`")
    bundle = onnx_file.export(path, tmp_path / "out", shape=[1, 6, 6])
    assert bundle.config["sample"]["shape"] == [1, 6, 6]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"family": "language"}, "'language' does not fit a plain ONNX file"),
        ({"prediction": "v"}, "prediction 'v' does not fit .*: expected sample, epsilon"),
        ({"sampler": "plms"}, "sampler 'plms' is unknown"),
        ({"colour": 3}, "option 'colour' does not fit a diffusion model"),
        ({"latent": "normal"}, "option 'latent' does not fit a diffusion model"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, text):
    path = graph(["noisy", "sigma"], tmp_path / "m.onnx")
    refused(path, tmp_path, UnsupportedError, text, **options)


def test_float64_samples_are_refused(tmp_path):
    text = "g (double[b, 1, 4, 4] noisy, float[b] sigma) => (double[b, 1, 4, 4] y) "
    path = _graph(text + "{ y = Add (noisy, noisy) }", tmp_path / "m.onnx")
    refused(path, tmp_path, UnsupportedError, "is float64, expected float32")


def test_an_existing_folder_is_left_alone(tmp_path):
    path = graph(["noisy", "sigma"], tmp_path / "m.onnx")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("data")
    refused(path, tmp_path, StorageError, "exists already")
    assert (tmp_path / "out" / "precious").read_text() == "data"


def test_weights_beside_the_file_must_be_there_and_whole(tmp_path):
    text = """g (float[b, 1, 4, 4] noisy, float[b] sigma) => (float[b, 1, 4, 32] y) {
        y = MatMul (noisy, w)
    }"""
    path = _graph(text, tmp_path / "m.onnx", w=(4, 32))
    data = tmp_path / "m.bin"
    onnx.save(
        onnx.load(path), path, save_as_external_data=True, location=data.name, size_threshold=0
    )
    weights = np.frombuffer(data.read_bytes(), np.float32)
    bundle = onnx_file.export(path, tmp_path / "out")
    session = ort.InferenceSession(bundle.graph("model"), providers=["CPUExecutionProvider"])
    x = np.ones((1, 1, 4, 4), np.float32)
    (y,) = session.run(None, {"noisy": x, "sigma": x[0, 0, 0, :1]})
    np.testing.assert_allclose(y[0, 0, 0], weights.reshape(4, 32).sum(axis=0), rtol=1e-5)
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(SourceError, match="'m.bin' is missing or cut off"):
        onnx_file.export(path, tmp_path / "again")
    data.unlink()
    with pytest.raises(SourceError, match="'m.bin' is missing or cut off"):
        onnx_file.export(path, tmp_path / "again")
    assert not (tmp_path / "again").exists()


def test_stale_shapes_are_deleted_and_nodes_get_names(tmp_path):
    """Entries of tensors that are no more, or with other sizes, stop ONNX Runtime."""
    path = _graph(
        """g (float[b, 1, 4, 4] noisy, float[b] sigma) => (float[b, 1, 4, 4] y) {
            h = Add (noisy, noisy)
            k = Add (h, h)
            y = Add (k, h)
        }""",
        tmp_path / "m.onnx",
    )
    model = onnx.load(path)
    model.graph.node[1].name = "kept"
    for name, shape in (("h", [9, 9]), ("gone", [2])):
        model.graph.value_info.append(helper.make_tensor_value_info(name, TensorProto.FLOAT, shape))
    onnx.save(model, path)
    bundle = onnx_file.export(path, tmp_path / "out")
    written = onnx.load(bundle.graph("model")).graph
    assert len(written.value_info) == 0
    names = [node.name for node in written.node]
    assert all(names)
    assert len(set(names)) == 3
    assert names[1] == "kept"
    session = ort.InferenceSession(bundle.graph("model"), providers=["CPUExecutionProvider"])
    x = np.ones((1, 1, 4, 4), np.float32)
    (y,) = session.run(None, {"noisy": x, "sigma": x[0, 0, 0, :1]})
    np.testing.assert_array_equal(y, 6 * x)
