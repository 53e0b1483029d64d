"""The Piper exporter: three graphs that together are the voice, and clear refusals."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from flow_models import HOP, RATE_HZ, SYMBOLS, voice_model, write_voice
from onnx import TensorProto, helper
from real_models import source

from leangen import families
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import onnx_cut, piper
from leangen.session import Session


def whole(path, ids, speaker=0):
    """The uncut voice without noise: scales are noise, length, duration noise."""
    session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    feeds = {
        "input": np.array([ids], np.int64),
        "input_lengths": np.array([len(ids)], np.int64),
        "scales": np.array([0, 1, 0], np.float32),
        "sid": np.array([speaker], np.int64),
    }
    wanted = {i.name for i in session.get_inputs()}
    return session.run(None, {k: v for k, v in feeds.items() if k in wanted})[0].reshape(-1)


def in_parts(session, ids, speaker=0):
    """The three parts without noise, joined by hand."""

    def run(role, **feeds):
        if "speaker" in {i.name for i in session.graph(role).get_inputs()}:
            feeds["speaker"] = np.array([speaker], np.int64)
        return session.run(role, feeds)

    mean, _, durations = run(
        "encoder",
        phoneme_ids=np.array([ids], np.int64),
        noise=np.zeros((1, 2, len(ids)), np.float32),
    )
    frames = np.ceil(durations[0, 0]).astype(int)
    (latent,) = run("flow", prior=np.repeat(mean, frames, axis=2))
    return run("decoder", latent=latent)[0].reshape(-1)


@pytest.mark.parametrize("speakers", [1, 2])
@pytest.mark.parametrize("count", [1, 2, 9, 40])
def test_the_parts_are_the_whole(speakers, count, tmp_path):
    path = write_voice(tmp_path, speakers=speakers)
    session = Session(piper.export(path, tmp_path / "bundle"), threads=1)
    ids = np.random.default_rng(count).integers(0, len(SYMBOLS), count).tolist()
    speaker = speakers - 1
    np.testing.assert_allclose(
        in_parts(session, ids, speaker), whole(path, ids, speaker), atol=1e-6
    )


def test_speakers_differ(tmp_path):
    path = write_voice(tmp_path, speakers=2)
    session = Session(piper.export(path, tmp_path / "bundle"), threads=1)
    a, b = (in_parts(session, [1, 4, 5, 2], speaker) for speaker in (0, 1))
    assert a.size != b.size or np.abs(a - b).max() > 1e-3


def test_node_names_stay_and_noise_comes_from_outside(tmp_path):
    path = write_voice(tmp_path)
    bundle = piper.export(path, tmp_path / "bundle")
    names = {n.name for n in onnx.load(path).graph.node}
    for role in ("encoder", "flow", "decoder"):
        graph = onnx.load(bundle.graph(role)).graph
        assert {n.name for n in graph.node} <= names
        assert not [n for n in graph.node if n.op_type.startswith("Random")]
    assert "/dec/conv_pre/Conv" in {n.name for n in onnx.load(bundle.graph("decoder")).graph.node}


def test_the_bundle_says_what_it_is(tmp_path):
    path = write_voice(tmp_path, speakers=2)
    assert piper.accepts(path)
    bundle = piper.export(path, tmp_path / "bundle", name="tiny-voice")
    assert (bundle.name, bundle.family, bundle.scheme) == ("tiny-voice", "flow", "fp32")
    config = bundle.config
    assert config["sample_rate_hz"] == RATE_HZ
    assert config["phoneme_id_map"]["_"] == [0]
    assert (config["speakers"], config["speaker_ids"]) == (2, {"ann": 0, "bob": 1})
    assert config["noise_w"] == 0.4
    assert families.of(bundle).UNIT == "audio-second"
    assert in_parts(Session(bundle), [1, 2]).size % HOP == 0


def fails(path, error, text, out):
    with pytest.raises(error, match=text) as caught:
        piper.export(path, out)
    assert "\n" not in str(caught.value)
    assert not out.exists()


def test_files_that_are_missing_or_damaged(tmp_path):
    path = write_voice(tmp_path / "voice")
    config, out = path.with_name("tiny.onnx.json"), tmp_path / "bundle"
    good = config.read_text(encoding="utf-8")
    onnx_bytes = path.read_bytes()

    config.unlink()
    assert not piper.accepts(path)
    fails(path, SourceError, r"tiny\.onnx\.json.*put both in one folder", out)
    for text in ("no json", "[]", '{"audio": {}}', '{"audio": 3, "phoneme_id_map": []}'):
        config.write_text(text)
        fails(path, SourceError, "JSON", out)
    config.write_text(json.dumps(json.loads(good) | {"phoneme_id_map": {"a": [1]}}))
    fails(path, SourceError, "phoneme_id_map lacks", out)
    config.write_text(good, encoding="utf-8")

    path.write_bytes(onnx_bytes[: len(onnx_bytes) // 2])
    fails(path, SourceError, "not an ONNX file", out)
    path.write_bytes(b"")
    fails(path, SourceError, "not an ONNX file", out)
    path.unlink()
    fails(path, SourceError, "cannot read", out)


def test_graphs_that_are_not_a_voice(tmp_path):
    path = write_voice(tmp_path)
    x = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [1])
    graph = helper.make_graph([helper.make_node("Relu", ["x"], ["y"])], "g", [x], [y])
    onnx.save(helper.make_model(graph), path)
    fails(path, UnsupportedError, "no input input, input_lengths, scales", tmp_path / "bundle")

    for broken, text in (
        ("/RandomNormalLike", "draws noise in 1 places"),
        ("/Ceil", "rounds up in 0 places"),
        ("/dec/conv_pre/Conv", "no node /dec/conv_pre/Conv"),
        ("/Mul_5", "expected one Mul"),
        ("/MatMul", "is not made by"),
    ):
        model = voice_model()
        node = next(n for n in model.graph.node if n.name == broken)
        node.name, node.op_type = "/other", "Identity"
        onnx.save(model, path)
        fails(path, UnsupportedError, text, tmp_path / "bundle")


def test_cut_names_a_missing_input():
    model = voice_model()
    with pytest.raises(ValueError, match="depends on its input 'input"):
        onnx_cut.cut(model, inputs={}, outputs={"/Mul_output_0": ("y", [1])}, constants={})


@pytest.mark.slow
def test_joe_is_the_same_voice(tmp_path):
    path = source("piper-joe")
    session = Session(piper.export(path, tmp_path / "bundle"))
    weights_file = session.bundle.asset("decoder.onnx.data")
    assert weights_file.stat().st_mode & 0o044 == 0o044  # others may read it
    ids = np.random.default_rng(0).integers(3, 60, 80).tolist()
    np.testing.assert_allclose(in_parts(session, ids), whole(path, ids), atol=1e-4)
