"""The linter on files made by onnxruntime's own quantizers: finds the traps, mends them."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from functools import cache
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from image_models import denoiser
from onnx import TensorProto, helper, numpy_helper
from onnxruntime.quantization import (
    CalibrationDataReader,
    QuantFormat,
    QuantType,
    matmul_bnb4_quantizer,
    matmul_nbits_quantizer,
    quantize_dynamic,
    quantize_static,
)
from tiny_bundles import BUILDERS

from leangen import lint
from leangen.bundle import open_bundle, verify
from leangen.cli import main
from leangen.errors import BundleError, StorageError, UnknownSchemeError
from leangen.graph_edit import Graph
from leangen.lint import cost, matmul, rules
from leangen.session import Session

QUIET = lambda *_: None  # noqa: E731
K, N = 512, 256


def linear(path, k=K, n=N, dtype=np.float32):
    """x [b, k] -> y [b, n]: one MatMul."""
    rng = np.random.default_rng(0)
    w = (rng.standard_normal((k, n)) / np.sqrt(k)).astype(dtype)
    kind = helper.np_dtype_to_tensor_dtype(np.dtype(dtype))
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"], "/mm")],
        "linear",
        [helper.make_tensor_value_info("x", kind, ["b", k])],
        [helper.make_tensor_value_info("y", kind, ["b", n])],
        [numpy_helper.from_array(w, "w")],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("com.microsoft", 1)]
    onnx.save(helper.make_model(graph, opset_imports=opsets, ir_version=10), path)
    return path


def nbits(path, config=None, **options):
    """A linear layer as onnxruntime's MatMulNBits quantizer leaves it."""
    model = onnx.load(linear(path))
    quantizer = matmul_nbits_quantizer.MatMulNBitsQuantizer(model, algo_config=config, **options)
    quantizer.process()
    onnx.save(quantizer.model.model, path)
    return path


def rtn(path, **options):
    return nbits(path, **{"bits": 4, "block_size": 32, "is_symmetric": True, **options})


def pair(path, **options):
    """DequantizeLinear and MatMul, as the quantizer leaves them when asked for QDQ."""
    return nbits(path, bits=4, block_size=32, quant_format=QuantFormat.QDQ, **options)


def coarse(path):
    """The `rtn` algorithm, which onnxruntime-genai's builder uses too."""
    config = matmul_nbits_quantizer.RTNWeightOnlyQuantConfig()
    return nbits(path, config, bits=4, block_size=32, is_symmetric=True)


def hqq(path):
    path.write_bytes(_hqq())
    return path


@cache
def _hqq():
    """The file's bytes: its weights are looked for, which takes a second."""
    pytest.importorskip("torch", reason="ONNX Runtime's HQQ quantizer needs it")
    config = matmul_nbits_quantizer.HQQWeightOnlyQuantConfig(block_size=64, bits=4)
    with tempfile.TemporaryDirectory() as folder:
        return nbits(Path(folder) / "hqq.onnx", config).read_bytes()


def bnb4(path):
    """A linear layer as onnxruntime's quantizer of bitsandbytes' formats leaves it."""
    quantizer = matmul_bnb4_quantizer.MatMulBnb4Quantizer(onnx.load(linear(path)), 1, 64)
    quantizer.process()
    onnx.save(quantizer.model.model, path)
    return path


class Pictures(CalibrationDataReader):
    def __init__(self):
        rng = np.random.default_rng(0)
        self.left = [
            {"noisy": rng.standard_normal((1, 1, 16, 16), np.float32) * 40,
             "sigma": np.float32([40]), "tilt": np.float32([0.3])}
            for _ in range(3)
        ]  # fmt: skip

    def get_next(self):
        return self.left.pop() if self.left else None


def static(path, kind=QuantType.QInt8, form=QuantFormat.QDQ, **options):
    source = denoiser(path.with_name("float.onnx"))
    quantize_static(
        source, path, Pictures(), quant_format=form, activation_type=kind,
        weight_type=QuantType.QInt8, per_channel=True, **options,
    )  # fmt: skip
    return path


def dynamic(path):
    source = denoiser(path.with_name("float.onnx"))
    quantize_dynamic(source, path, op_types_to_quantize=["Conv"], weight_type=QuantType.QUInt8)
    return path


def edit(path, change):
    model = onnx.load(path)
    change(model)
    onnx.save(model, path)
    return path


def grouped(path, shuffled):
    """A quantized layer with g_idx, in order or as GPTQ's act-order leaves it."""

    def change(model):
        (node,) = model.graph.node
        groups = np.arange(K, dtype=np.int32) // 32
        if shuffled:
            groups = np.random.default_rng(1).permutation(groups)
        model.graph.initializer.append(numpy_helper.from_array(groups, "g_idx"))
        while len(node.input) < 4:
            node.input.append("")
        node.input.append("g_idx")

    return edit(rtn(path, accuracy_level=1), change)


def float_points(path):
    """Whole zero points stored as floats, as some exporters write them."""

    def change(model):
        (node,) = model.graph.node
        stored = {tensor.name: tensor for tensor in model.graph.initializer}
        packed = numpy_helper.to_array(stored[node.input[3]])
        points = matmul.unpack(packed.reshape(N, -1), 4).astype(np.float32)
        stored[node.input[3]].CopyFrom(numpy_helper.from_array(points.reshape(-1), node.input[3]))

    return edit(rtn(path, is_symmetric=False, accuracy_level=1), change)


def stale(path):
    def change(model):
        model.graph.value_info.append(helper.make_tensor_value_info("gone", TensorProto.FLOAT, [3]))

    return edit(linear(path), change)


def untrue(path, shape=(7, 7, 7), kind=TensorProto.FLOAT):
    def change(model):
        model.graph.node[-1].output[0] = "hidden"
        model.graph.node.append(helper.make_node("Identity", ["hidden"], ["y"], "last"))
        model.graph.value_info.append(helper.make_tensor_value_info("hidden", kind, shape))

    return edit(linear(path), change)


def half(path):
    return linear(path, dtype=np.float16)


# rule, how the file is made, how far the fix may move the output relative to its largest value
EXACT = 2e-6
CASES = {
    "accuracy-level, none": (rtn, 0.03),
    "accuracy-level, fp32 at 4 bits": (lambda path: rtn(path, accuracy_level=1), 0.03),
    "accuracy-level, bf16 at 4 bits": (lambda path: rtn(path, accuracy_level=3), 0.03),
    "accuracy-level, none at 8 bits": (lambda path: nbits(path, bits=8, block_size=128), 0.03),
    "accuracy-level, fp16 at 2 bits": (lambda path: rtn(path, bits=2, accuracy_level=2), 0.03),
    "bnb4-on-cpu": (bnb4, None),
    "blockwise-pair, zero points": (lambda path: pair(path, is_symmetric=False), EXACT),
    "blockwise-pair, symmetric": (lambda path: pair(path, is_symmetric=True), EXACT),
    "coarse-step": (coarse, None),
    "float-zero-points, HQQ": (hqq, EXACT),
    "float-zero-points, whole": (float_points, EXACT),
    "g-idx, in order": (lambda path: grouped(path, False), EXACT),
    "g-idx, act-order": (lambda path: grouped(path, True), EXACT),
    "s8s8-convolution, QDQ": (static, EXACT),
    "s8s8-convolution, QOperator": (lambda p: static(p, form=QuantFormat.QOperator), EXACT),
    "conv-integer": (dynamic, EXACT),
    "convtranspose-qdq": (lambda path: static(path, QuantType.QUInt8), EXACT),
    "fp16-on-cpu": (half, 2e-3),
    "stale-value-info": (stale, EXACT),
    "stale-value-info, of another rank": (untrue, EXACT),
    "stale-value-info, of another size": (lambda path: untrue(path, ("b", 7)), EXACT),
}


def run(path, seed=5):
    options = ort.SessionOptions()
    options.log_severity_level = 4
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    rng = np.random.default_rng(seed)
    feeds = {}
    for entry in session.get_inputs():
        shape = [size if isinstance(size, int) else 1 for size in entry.shape]
        dtype = np.float16 if "float16" in entry.type else np.float32
        feeds[entry.name] = (rng.standard_normal(shape) * 30).astype(dtype)
    return session.run(None, feeds)


@pytest.mark.parametrize("case", CASES)
def test_the_trap_is_found_and_mended(case, tmp_path):
    make, allowed = CASES[case]
    name = case.split(",")[0]
    path, out = make(tmp_path / "trap.onnx"), tmp_path / "mended.onnx"
    found = [f for f in lint.lint(path, "f", timed=False, progress=QUIET) if f.rule.name == name]
    assert found, "the trap is there"
    assert all(f.fixable == (allowed is not None) for f in found)
    if allowed is None:
        assert found[0].rule.remedy
        return
    exact = found[0].rule.changes is None
    fixed = lint.fix_file(path, out, exact=exact)
    assert fixed[name] >= 1
    left = lint.lint(out, "f", timed=False, progress=QUIET)
    assert name not in {f.rule.name for f in left}
    for before, after in zip(run(path), run(out), strict=True):
        assert before.dtype == after.dtype
        scale = np.abs(before).max()
        difference = np.abs(before.astype(np.float64) - after).max() / scale
        assert difference <= allowed, f"the fix moved the output by {difference:.1e}"


def test_a_clean_file_has_no_findings(tmp_path):
    assert lint.lint(linear(tmp_path / "m.onnx"), "m", progress=QUIET) == []
    assert lint.lint(denoiser(tmp_path / "d.onnx"), "d", progress=QUIET) == []
    with pytest.raises(BundleError, match="nothing that lint can fix"):
        lint.fix_file(tmp_path / "m.onnx", tmp_path / "o.onnx")
    assert not (tmp_path / "o.onnx").exists()


@pytest.mark.parametrize("family", BUILDERS)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_leangens_own_bundles_are_clean(family, scheme, tmp_path):
    from leangen.quantize import quantize

    try:
        bundle = quantize(BUILDERS[family](tmp_path / "t"), scheme, tmp_path / "q")
    except UnknownSchemeError:
        pytest.skip("its weights are too small to quantize")
    assert lint.lint_bundle(bundle, timed=False, progress=QUIET) == []


@pytest.fixture
def now_ns(monkeypatch):
    """The clock, which only `Timed` moves."""
    now = [0]
    monkeypatch.setattr(cost.clock, "monotonic_ns", lambda: now[0])
    return now


class Timed:
    """A session of which opening and each run take a time of their own, now and then a long one."""

    def __init__(self, session, now_ns, run_ns):
        self.session, self.now_ns, self.run_ns, self.runs = session, now_ns, run_ns, 0

    def run(self, *of):
        self.runs += 1
        self.now_ns[0] += self.run_ns * (50 if self.runs % 3 == 0 else 1)
        return self.session.run(*of)


@pytest.mark.parametrize(("run_ms", "runs"), [((8, 2), range(5, 20)), ((900, 300), range(5, 8))])
def test_the_cost_is_the_median_of_alternating_runs(run_ms, runs, tmp_path, monkeypatch, now_ns):
    """Of the file as it is and as mended, for as long as the budget says or the least of runs."""
    opened, order = [], []
    open_session = cost._open

    def timed(path):
        session = Timed(open_session(path), now_ns, run_ms[path.stem == "after"] * 1_000_000)
        opened.append(session)
        order.append(path.stem)
        return session

    monkeypatch.setattr(cost, "_open", timed)
    found = {f.rule.name: f for f in lint.lint(hqq(tmp_path / "h.onnx"), "h", progress=QUIET)}
    measured = found["float-zero-points"].cost
    assert (measured.before_s, measured.after_s) == tuple(ms / 1000 for ms in run_ms)
    assert order[:2] == ["before", "after"]
    assert opened[0].runs == opened[1].runs and opened[0].runs - 1 in runs  # one is the warm-up


def test_a_cost_of_opening_is_timed_on_opening(tmp_path, monkeypatch, now_ns):
    open_session = cost._open

    def timed(path):
        now_ns[0] += {"before": 7_000_000, "after": 3_000_000}[path.stem]
        return open_session(path)

    monkeypatch.setattr(cost, "_open", timed)
    path = pair(tmp_path / "p.onnx", is_symmetric=True)
    found = {f.rule.name: f for f in lint.lint(path, "p", progress=QUIET)}["blockwise-pair"]
    assert found.to_json()["cost_of"] == "opening"
    assert (found.cost.before_s, found.cost.after_s) == (0.007, 0.003)


def test_the_difference_is_that_of_the_pattern(tmp_path):
    found = {f.rule.name: f for f in lint.lint(hqq(tmp_path / "h.onnx"), "h", progress=QUIET)}
    assert found["float-zero-points"].cost.difference < 1e-4
    found = {f.rule.name: f for f in lint.lint(static(tmp_path / "s.onnx"), "s", progress=QUIET)}
    assert found["s8s8-convolution"].cost.difference < 1e-4
    json.dumps([f.to_json() for f in found.values()], allow_nan=False)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("level", [0, 1, 2, 3])
def test_every_level_but_the_fourth_is_found_and_its_cost_told(bits, level, tmp_path, monkeypatch):
    monkeypatch.setattr(cost, "BUDGET_S", 0.0)  # how much it costs is for bench/lint.py to say
    path = nbits(tmp_path / "m.onnx", bits=bits, block_size=32, accuracy_level=level)
    found = {f.rule.name: f for f in lint.lint(path, "m", progress=QUIET)}
    measured = found["accuracy-level"].cost
    assert measured.before_s > 0 and measured.after_s > 0 and measured.difference < 0.03


def test_fp32_activations_that_a_bundle_asks_for_are_left_alone(tmp_path):
    from leangen.quantize import quantize

    bundle = quantize(BUILDERS["language"](tmp_path / "t"), "int4-wo", tmp_path / "q")
    assert lint.lint_bundle(bundle, timed=False, progress=QUIET) == []
    with pytest.raises(BundleError, match="nothing that lint can fix"):
        lint.fix_bundle(bundle, tmp_path / "o")
    path = bundle.graph("model")
    assert lint.lint(path, "m", timed=False, progress=QUIET), "of a file nothing is known"


def test_exact_fixes_only_leave_the_level_alone(tmp_path):
    path = hqq(tmp_path / "h.onnx")
    assert set(lint.mend(Graph(path), exact=True)) == {"float-zero-points"}
    assert set(lint.mend(Graph(path), exact=False)) == {"float-zero-points", "accuracy-level"}


@pytest.mark.slow
def test_on_a_file_of_onnxruntime_genais_builder(tmp_path):
    """A tiny llama in fp16 for the CPU: the trap is found, timed and mended."""
    pytest.importorskip("onnxruntime_genai")
    torch, transformers = (pytest.importorskip(name) for name in ("torch", "transformers"))
    from tokenizers import Tokenizer, models

    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, vocab_size=300, max_position_embeddings=256,
        bos_token_id=1, eos_token_id=2, pad_token_id=0, tie_word_embeddings=False,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(tmp_path / "src")
    words = Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, unk_token="<unk>"))
    transformers.PreTrainedTokenizerFast(tokenizer_object=words).save_pretrained(tmp_path / "src")
    command = [sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", tmp_path / "src"]
    command += ["-o", tmp_path / "out", "-p", "fp16", "-e", "cpu", "-c", tmp_path / "cache"]
    subprocess.run(command, check=True, capture_output=True)
    found = lint.lint(tmp_path / "out" / "model.onnx", "genai", progress=QUIET)
    [halves] = [f for f in found if f.rule.name == "fp16-on-cpu"]
    assert halves.cost is not None
    lint.fix_file(tmp_path / "out" / "model.onnx", tmp_path / "mended.onnx")
    assert lint.lint(tmp_path / "mended.onnx", "genai", timed=False, progress=QUIET) == []


def test_saturation_is_a_matter_of_the_cpu(tmp_path, monkeypatch):
    """Found on AVX2 without VNNI; uint8 weights mean the same and cannot saturate."""
    for flags, saturates in (("avx2 fma", True), ("avx2 avx_vnni", False), ("asimddp", False)):
        (tmp_path / "proc").mkdir(exist_ok=True)
        (tmp_path / "proc/cpuinfo").write_text(f"processor: 0\nflags\t\t: {flags}\n")
        assert rules.saturating(tmp_path) == saturates
    path = static(tmp_path / "s.onnx", QuantType.QUInt8)
    names = {f.rule.name for f in lint.lint(path, "s", timed=False, progress=QUIET)}
    monkeypatch.setattr("leangen.lint.conv.saturating", lambda: True)
    found = lint.lint(path, "s", timed=False, progress=QUIET)
    names = {f.rule.name for f in found}
    assert "u8s8-saturation" in names
    lint.fix_file(path, tmp_path / "o.onnx")
    left = {f.rule.name for f in lint.lint(tmp_path / "o.onnx", "o", timed=False, progress=QUIET)}
    assert "u8s8-saturation" not in left
    before, after = run(path)[0], run(tmp_path / "o.onnx")[0]
    np.testing.assert_allclose(after, before, atol=0.02 * np.abs(before).max())


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_codes_survive_packing(bits):
    codes = np.random.default_rng(0).integers(0, 1 << bits, (3, 5, 24), np.uint8)
    np.testing.assert_array_equal(matmul.unpack(matmul.pack(codes, bits), bits), codes)


def test_a_bundle_is_mended_whole(tmp_path):
    from leangen.quantize import quantize

    bundle = quantize(BUILDERS["oneshot"](tmp_path / "t"), "int4", tmp_path / "q")
    broken = tmp_path / "broken"
    import shutil

    from leangen.bundle import create

    with create(broken) as draft:
        for name in bundle.files:
            shutil.copyfile(bundle.path / name, draft.folder / name)
        graph = draft.folder / bundle.graphs["model"]
        model = onnx.load(graph, load_external_data=False)
        model.graph.value_info.append(helper.make_tensor_value_info("gone", 1, [3]))
        onnx.save(model, graph)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, bundle.scheme
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
    assert main(["lint", str(broken), "--fix", "-o", str(tmp_path / "mended")]) == 0
    mended = open_bundle(tmp_path / "mended")
    verify(mended)
    assert mended.quantization["mended"] == {"stale-value-info": 1}
    z = {"z": np.ones((1, 16), np.float32)}
    np.testing.assert_array_equal(
        Session(mended).run("model", z)[0], Session(bundle).run("model", z)[0]
    )


def test_the_command(tmp_path, capsys):
    path = coarse(tmp_path / "m.onnx")
    assert main(["lint", str(path)]) == 1
    out = capsys.readouterr().out
    assert "accuracy-level: 4-bit MatMulNBits without accuracy_level" in out
    assert "fixed (" in out
    assert "--fix changes: activations are rounded to int8" in out
    assert "no fix here: what was rounded away is lost" in out
    fixed = tmp_path / "o" / "fixed.onnx"
    assert main(["lint", str(path), "--no-timing", "--json", "--fix", "-o", str(fixed)]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["fixed"] == {"accuracy-level": 1}
    assert {f["rule"] for f in document["findings"]} == {"accuracy-level", "coarse-step"}
    assert main(["lint", str(path), "--no-timing", "--fix", "-o", str(fixed)]) == 2
    assert "exists already" in capsys.readouterr().err
    assert main(["lint", str(linear(tmp_path / "clean.onnx"))]) == 0
    assert "no trap found" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "there is no ONNX file"), (b"", "not an ONNX graph"), (b"not onnx", "not an ONNX")],
)
def test_bad_files(tmp_path, capsys, content, message):
    path = tmp_path / "m.onnx"
    if content is not None:
        path.write_bytes(content)
    assert main(["lint", str(path)]) == 2
    assert message in capsys.readouterr().err
    assert main(["lint", str(path), "--fix"]) == 2


@pytest.mark.parametrize("symmetric", [True, False])
def test_4_bit_weights_in_a_file_of_their_own(symmetric, tmp_path):
    path = pair(tmp_path / "m.onnx", is_symmetric=symmetric)
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w", size_threshold=0)
    Graph(path).save(tmp_path / "copy.onnx")
    lint.fix_file(path, tmp_path / "mended.onnx")
    for other in ("copy.onnx", "mended.onnx"):
        np.testing.assert_allclose(run(tmp_path / other)[0], run(path)[0], rtol=1e-5, atol=1e-4)


def test_missing_weights_are_named(tmp_path, capsys):
    path = linear(tmp_path / "m.onnx")
    onnx.save(onnx.load(path), path, save_as_external_data=True, location="w", size_threshold=0)
    (tmp_path / "w").write_bytes(b"short")
    assert main(["lint", str(path)]) == 2
    assert "'w' is missing or cut off" in capsys.readouterr().err


def test_a_full_disk_leaves_the_old_file(tmp_path, monkeypatch):
    path, out = rtn(tmp_path / "m.onnx"), tmp_path / "o.onnx"
    out.write_bytes(b"old")

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("leangen.lint.shutil.copyfileobj", full)
    with pytest.raises(StorageError, match="disk full"):
        lint.fix_file(path, out, replace=True)
    assert out.read_bytes() == b"old"
    assert sorted(p.name for p in tmp_path.iterdir() if p.is_file()) == ["m.onnx", "o.onnx"]
