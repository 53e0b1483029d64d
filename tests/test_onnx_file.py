"""The exporter of plain ONNX files: what it recognises, what it refuses."""

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from image_models import denoiser, gaussian_denoiser, generator, model, value

from leangen.bundle import verify
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import onnx_file


def test_a_denoiser_is_recognised_and_computes_the_same(tmp_path):
    path = denoiser(tmp_path / "tiny.onnx")
    bundle = onnx_file.export(path, tmp_path / "b", name="tiny", conditions={"tilt": {"max": 2.0}})
    verify(bundle)
    assert (bundle.name, bundle.family, bundle.scheme) == ("tiny", "diffusion", "fp32")
    config = bundle.config
    assert config["sample"] == {"input": "noisy", "output": "denoised", "shape": [1, 16, 16]}
    assert config["noise_level"]["kind"] == "sigma" and config["noise_level"]["max"] == 80.0
    assert (config["prediction"], config["sampler"], config["steps"]) == (
        "sample",
        "consistency",
        1,
    )
    assert config["conditions"]["tilt"]["max"] == 2.0
    rng = np.random.default_rng(0)
    feeds = {"noisy": rng.standard_normal((1, 1, 16, 16), np.float32)}
    feeds |= {"sigma": np.float32([3]), "tilt": np.float32([0.1])}
    first, second = (
        ort.InferenceSession(str(p), providers=["CPUExecutionProvider"]).run(None, feeds)[0]
        for p in (path, bundle.graph("model"))
    )
    assert np.array_equal(first, second)


def test_large_weights_become_external_data_and_stale_shapes_go(tmp_path):
    path = denoiser(tmp_path / "tiny.onnx")
    stale = onnx.load(path)
    stale.graph.value_info.append(value("h2", [1, 2, 3, 4]))
    for node in stale.graph.node:
        node.name = ""
    onnx.save(stale, path)
    graph = onnx.load(
        onnx_file.export(path, tmp_path / "b").graph("model"), load_external_data=False
    )
    assert not graph.graph.value_info
    assert all(node.name for node in graph.graph.node)
    external = {t.name for t in graph.graph.initializer if t.external_data}
    assert {"w_mid", "w_deep", "w_up"} <= external and "zero" not in external


def test_a_generator_is_recognised(tmp_path):
    bundle = onnx_file.export(generator(tmp_path / "g.onnx"), tmp_path / "b", range=[-1, 1])
    assert bundle.family == "oneshot" and bundle.config["range"] == [-1, 1]
    assert bundle.config["latent"] == {"input": "z", "shape": [8], "kind": "normal"}


def test_file_names_decide_whether_it_is_looked_at(tmp_path):
    assert onnx_file.accepts(tmp_path / "a.onnx") and not onnx_file.accepts(tmp_path / "a.gguf")


@pytest.mark.parametrize("content", [b"", b"not an onnx file at all", b"\x08\x07\x12"])
def test_files_that_are_not_onnx_are_refused_and_leave_nothing(tmp_path, content):
    path = tmp_path / "bad.onnx"
    path.write_bytes(content)
    with pytest.raises(SourceError, match="bad.onnx"):
        onnx_file.export(path, tmp_path / "b")
    assert not (tmp_path / "b").exists()


def test_cut_off_files_are_refused(tmp_path):
    path = denoiser(tmp_path / "tiny.onnx")
    path.write_bytes(path.read_bytes()[:-3000])
    with pytest.raises(SourceError, match="cut off"):
        onnx_file.export(path, tmp_path / "b")


def test_missing_weight_files_are_refused(tmp_path):
    path = tmp_path / "tiny.onnx"
    whole = onnx.load(denoiser(path))
    onnx.save(whole, path, save_as_external_data=True, location="w.bin", size_threshold=100)
    (tmp_path / "w.bin").write_bytes((tmp_path / "w.bin").read_bytes()[:50])
    with pytest.raises(SourceError, match=r"w\.bin.*missing or cut off"):
        onnx_file.export(path, tmp_path / "b")
    (tmp_path / "w.bin").unlink()
    with pytest.raises(SourceError, match=r"w\.bin.*missing or cut off"):
        onnx_file.export(path, tmp_path / "b")


def test_inputs_that_are_not_understood_are_named(tmp_path):
    path = tmp_path / "odd.onnx"
    node = onnx.helper.make_node("Relu", ["pixels"], ["y"])
    onnx.save(model([node], [value("pixels", [1, 3, 8, 8])], [value("y", [1, 3, 8, 8])], {}), path)
    with pytest.raises(UnsupportedError, match="has inputs pixels: expected one named"):
        onnx_file.export(path, tmp_path / "b")
    with pytest.raises(UnsupportedError, match="needs its noise level"):
        onnx_file.export(path, tmp_path / "b", family="diffusion")


@pytest.mark.parametrize(
    "options, text",
    [
        ({"family": "language"}, "family 'language' does not fit"),
        ({"prediction": "v"}, "prediction 'v' does not fit"),
        ({"sampler": "plms"}, "sampler 'plms' is unknown"),
        ({"colour": 1}, "option 'colour' does not fit"),
        ({"steps": 0}, "option steps is 0, expected a whole number above 0"),
        ({"steps": "few"}, "option steps is 'few', expected a whole number"),
        ({"range": [1]}, r"option range is \[1\], expected the lowest and the highest value"),
        ({"shape": "x"}, "option shape is 'x', expected sizes without the batch"),
        ({"conditions": 7}, "option conditions is 7, expected values by the name of an input"),
        ({"conditions": {"label": {}}}, "conditions name label, expected inputs of the model"),
    ],
)
def test_options_that_do_not_fit_are_refused(tmp_path, options, text):
    path = gaussian_denoiser(tmp_path / "g.onnx", 0, 1)
    with pytest.raises(UnsupportedError, match=text):
        onnx_file.export(path, tmp_path / "b", **options)


def test_open_sizes_need_the_shape_option(tmp_path):
    path = gaussian_denoiser(tmp_path / "g.onnx", 0, 1)
    graph = onnx.load(path)
    graph.graph.input[0].CopyFrom(value("noisy", ["b", 1, "h", "w"]))
    onnx.save(graph, path)
    with pytest.raises(UnsupportedError, match="leaves its sizes open"):
        onnx_file.export(path, tmp_path / "b")
    assert onnx_file.export(path, tmp_path / "b", shape=[1, 8, 8]).config["sample"]["shape"] == [
        1,
        8,
        8,
    ]
