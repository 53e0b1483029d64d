"""What holds of every family in every scheme: close to fp32, portable, the same bytes each time."""

import json
import os
import pickle
import subprocess
import sys

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import tiny_bundles
from flow_models import drain, flow_state, write_voice
from onnx import TensorProto, helper, numpy_helper

from leangen import families, schemes
from leangen.bundle import open_bundle, verify
from leangen.errors import StorageError, UnknownSchemeError
from leangen.exporters import onnx_file, piper, pzflow
from leangen.quantize import quantize
from leangen.session import Session
from leangen.treatments import code_bits

# The tiny bundles of these families have no weight that is worth packing: theirs are wider.


def speech(folder):
    """A voice of 64 channels."""
    return piper.export(write_voice(folder, width=64), folder / "bundle")


def density(folder):
    """Three couplings with hidden layers of 64."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = (np.float32([0, 0, 0]), np.float32([1, 2, 3]), 4)
    coupling = ("NeuralSplineCoupling", (8, 5, 2, 64, None, 0, False))
    parts = [("ShiftBounds", bounds), *[coupling, ("Roll", (1,))] * 3]
    path = folder / "wide.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state(parts, 3)))
    return pzflow.export(path, folder / "bundle")


def diffusion(folder):
    """A denoiser that goes down and up: two convolutions with bias, one transposed, a head."""
    text = """
    denoiser (float[b, 1, 8, 8] noisy, float[b] sigma, float[b] wetness) => (float[b, 1, 8, 8] y) {
        axes = Constant <value = int64[3] {1, 2, 3}> ()
        s = Unsqueeze (sigma, axes)
        c = Unsqueeze (wetness, axes)
        one = Constant <value = float {1.0}> ()
        t = Add (s, one)
        x = Div (noisy, t)
        h0 = Conv <pads = [1, 1, 1, 1]> (x, w0, b0)
        a0 = Sigmoid (h0)
        h1 = Conv <pads = [1, 1, 1, 1], strides = [2, 2]> (a0, w1, b1)
        a1 = Relu (h1)
        h2 = ConvTranspose <strides = [2, 2]> (a1, w2)
        h3 = Add (h2, a0)
        h4 = Add (h3, c)
        y = Conv <pads = [1, 1, 1, 1]> (h4, w3)
    }"""
    shapes = {"w0": (32, 1, 3, 3), "w1": (32, 32, 3, 3), "w2": (32, 32, 2, 2), "w3": (1, 32, 3, 3)}
    path = tiny_bundles._graph(text, folder / "wide.onnx", **shapes, b0=(32,), b1=(32,))
    return onnx_file.export(path, folder / "bundle", conditions={"wetness": {"default": 0.5}})


def oneshot(folder):
    """A generator with a dense layer of 64 inputs."""
    text = """
    generator (float[b, 64] z) => (float[b, 1, 8, 8] y) {
        m = MatMul (z, w0)
        h = Add (m, b0)
        shape = Constant <value = int64[4] {-1, 16, 8, 8}> ()
        r = Reshape (h, shape)
        y = Conv <pads = [1, 1, 1, 1]> (r, w1)
    }"""
    path = tiny_bundles._graph(
        text, folder / "wide.onnx", w0=(64, 1024), b0=(1024,), w1=(1, 16, 3, 3)
    )
    return onnx_file.export(path, folder / "bundle", family="oneshot")


BUILDERS = tiny_bundles.BUILDERS | {
    "oneshot": oneshot,
    "flow/speech": speech,
    "flow/density": density,
    "diffusion": diffusion,
}
CLOSE = {"fp16": 1e-2, "bf16": 5e-2, "int8": 0.2, "int4": 0.7, "nf4": 0.7, "fp4": 0.9}
CLOSE |= {"int3": 1.2, "int2": 2, "int4-asym-g16": 0.7, "int4-g64-wo-e4": 0.7, "int8-wo": 0.2}
"""Relative error of a graph's outputs that random weights may show; trained ones are kinder."""

# Graphs differ by family, packed forms by scheme: all families in two schemes, all schemes in two.
CASES = [
    (family, scheme)
    for family in BUILDERS
    for scheme in CLOSE
    if scheme in ("int8", "int4") or family in ("language", "diffusion")
]
every_case = pytest.mark.parametrize(("family", "scheme"), CASES)
every_scheme = pytest.mark.parametrize("scheme", CLOSE)
assert schemes.SCHEMES.keys() <= CLOSE.keys()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Bundles by family and scheme, each made once."""
    folder, made = tmp_path_factory.mktemp("laws"), {}

    def get(family, scheme="fp32"):
        place = folder / family.replace("/", "-")
        if (family, scheme) not in made:
            made[family, scheme] = (
                BUILDERS[family](place)
                if scheme == "fp32"
                else quantize(get(family), scheme, place / scheme)
            )
        return made[family, scheme]

    return get


def feeds(exact):
    """Feeds of each graph, by role: those of a generation where they pass through `run`."""
    seen = {}

    class Recorder(Session):
        def run(self, role, feeds, outputs=None):
            seen.setdefault(role, feeds)
            return super().run(role, feeds, outputs)

    family = families.of(exact)
    request = family.Request(**tiny_bundles.OPTIONS[families.key(exact)])
    output = drain(family.run(Recorder(exact), request))[1]
    if families.key(exact) == "flow/density":
        drain(family.run(Recorder(exact), family.Request(data=output.array)))
    return {role: seen.get(role) or language_feeds(exact, role) for role in exact.graphs}


def language_feeds(exact, role):
    """Seven tokens into an empty cache of 16 places: the family binds its feeds to memory."""
    made = {
        "input_ids": np.arange(3, 10, dtype=np.int64)[None],
        "seqlens_k": np.array([6], np.int32),
        "total_sequence_length": np.array(7, np.int32),
        "logits_from": np.array([0], np.int64),
    }
    rng = np.random.default_rng(0)
    graph = onnx.load(exact.graph(role), load_external_data=False).graph
    for value in graph.input:
        if value.name.startswith("past_"):
            heads, size = (value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
            made[value.name] = np.zeros((1, heads, 16, size), np.float32)
        if value.name.startswith("cross_"):  # what an encoder made of five frames
            heads, size = (value.type.tensor_type.shape.dim[axis].dim_value for axis in (1, 3))
            made[value.name] = rng.standard_normal((1, heads, 5, size), np.float32)
    return made


def plain_run(path, feed):
    """The outputs in ONNX Runtime as it comes."""
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feed)


def all_nodes(graph):
    """Nodes of a graph and of its subgraphs."""
    for node in graph.node:
        yield node
        for attribute in node.attribute:
            for inner in [attribute.g, *attribute.graphs]:
                yield from all_nodes(inner)


def models(of):
    """The ONNX models of a bundle, weights included, by role."""
    return {role: onnx.load(of.graph(role)) for role in of.graphs}


def stored(of):
    """The initializers of a bundle; of those that share their bytes in a file the first."""
    seen = set()
    for role, model in models(of).items():
        bare = onnx.load(of.graph(role), load_external_data=False)
        for tensor, entry in zip(model.graph.initializer, bare.graph.initializer, strict=True):
            place = {field.key: field.value for field in entry.external_data}
            key = (role, place.get("offset", tensor.name))
            if key not in seen:
                seen.add(key)
                yield tensor


@every_case
def test_plain_onnx_runtime_runs_it_and_agrees_with_fp32(bundle, family, scheme):
    exact, low = bundle(family), bundle(family, scheme)
    verify(open_bundle(low.path))
    for role, feed in feeds(exact).items():
        model = onnx.load(low.graph(role), load_external_data=False)
        assert {entry.domain for entry in model.opset_import} <= {"", "ai.onnx", "com.microsoft"}
        pairs = zip(
            plain_run(low.graph(role), feed), plain_run(exact.graph(role), feed), strict=True
        )
        for ours, reference in pairs:
            assert ours.shape == reference.shape
            assert ours.dtype == reference.dtype
            if reference.dtype.kind == "f" and reference.size:
                error = np.linalg.norm(ours - reference)
                assert error <= CLOSE[scheme] * np.linalg.norm(reference), role


@every_case
def test_its_family_generates_with_it(bundle, family, scheme):
    low = bundle(family, scheme)
    module = families.of(low)
    request = module.Request(**tiny_bundles.OPTIONS[family])
    steps, output = drain(module.run(Session(low), request))
    assert steps
    assert output.array is None or np.isfinite(output.array).all()


def test_it_runs_where_leangen_is_not(bundle, tmp_path):
    """A process of its own that may import ONNX Runtime and NumPy alone."""
    exact, low = bundle("diffusion"), bundle("diffusion", "int4")
    np.savez(tmp_path / "feed.npz", **feeds(exact)["model"])
    code = (
        "import sys, numpy, onnxruntime\n"
        "session = onnxruntime.InferenceSession(sys.argv[1])\n"
        "(y,) = session.run(None, dict(numpy.load(sys.argv[2])))\n"
        "assert y.shape == (1, 1, 8, 8) and numpy.isfinite(y).all()\n"
        "assert not [name for name in sys.modules if name.startswith('leangen')]\n"
    )
    command = [sys.executable, "-I", "-c", code, low.graph("model"), tmp_path / "feed.npz"]
    subprocess.run(command, check=True, cwd=tmp_path)


@every_case
def test_the_manifest_says_what_became_of_each_node_and_why(bundle, family, scheme):
    exact, low = bundle(family), bundle(family, scheme)
    manifest = json.loads((low.path / "leangen.json").read_text(encoding="utf-8"))
    said = manifest["quantization"]
    assert (manifest["scheme"], said["scheme"]) == (scheme, scheme)
    assert (low.name, low.family, low.config) == (exact.name, exact.family, exact.config)
    assert said["nodes"]
    for node in said["nodes"].values():
        assert code_bits(node["treatment"]) <= node["bits"] <= 32
        assert len(node["reason"]) > 10
    assert (0 < said["weights_8bit_or_fewer"] <= 1) == (scheme not in ("fp16", "bf16"))
    assert low.size_bytes < exact.size_bytes


@every_case
def test_bits_per_weight_are_what_the_files_hold(bundle, family, scheme):
    """Counted anew from the initializers; zero points and other small constants are not weights."""
    exact, low = bundle(family), bundle(family, scheme)
    weights = sum(
        numpy_helper.to_array(tensor).size
        for tensor in stored(exact)
        if tensor.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
    )
    bits = slack = 0
    for tensor in stored(low):
        array = numpy_helper.to_array(tensor)
        if array.dtype.itemsize <= 2 or array.dtype == np.float32:
            bits += array.nbytes * 8
            small = tensor.name.startswith("const/") or tensor.name.endswith("bias_scale")
            slack += array.nbytes * 8 if small else 0
        elif tensor.name.endswith("bias_q"):  # stands for a float bias of that size
            bits += array.nbytes * 8
    said = low.quantization["bits_per_weight"]
    assert (bits - slack) / weights == pytest.approx(said, rel=0.01)


def traps(graph, level=4):
    """Forms that ONNX Runtime runs slowly or wrongly."""
    nodes = list(all_nodes(graph))
    made_by = {output: node for node in nodes for output in node.output}
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    floats = (TensorProto.FLOAT, TensorProto.FLOAT16, TensorProto.BFLOAT16)
    slow = {
        "ConvInteger",
        "MatMulInteger",
        "DynamicQuantizeLinear",
        "DynamicQuantizeMatMul",
    }
    for node in nodes:
        options = {a.name: helper.get_attribute_value(a) for a in node.attribute}
        inputs = list(node.input)
        if node.op_type in slow:
            yield f"{node.op_type} {node.name}"
        if node.op_type == "MatMulNBits":
            if options.get("accuracy_level") != level:
                yield f"accuracy_level of {node.name}"
            if len(inputs) > 3 and inputs[3] and types.get(inputs[3]) != TensorProto.UINT8:
                yield f"zero points of {node.name}"
            if len(inputs) > 4 and inputs[4]:
                yield f"g_idx of {node.name}"
        place = {"QuantizeLinear": 2, "DequantizeLinear": 2, "GatherBlockQuantized": 3}
        zero = inputs[place[node.op_type] :][:1] if node.op_type in place else []
        if zero and types.get(zero[0]) in floats:
            yield f"float zero points of {node.name}"
        if node.op_type == "Conv" and inputs[0] in made_by:
            source = made_by[inputs[0]]
            if source.op_type == "DequantizeLinear":
                if types.get(source.input[2]) != TensorProto.UINT8:
                    yield f"activations of {node.name} are not u8"
                if made_by[inputs[1]].op_type != "DequantizeLinear":
                    yield f"weight of {node.name} is not int8"


@every_case
def test_no_form_that_onnx_runtime_is_slow_at(bundle, family, scheme):
    for model in models(bundle(family, scheme)).values():
        assert list(traps(model.graph, level=1 if "-wo" in scheme else 4)) == []
        assert len(model.graph.value_info) == 0  # of tensors that are no more


def test_such_forms_would_be_noticed(bundle):
    """Each trap, set in a graph that has none, springs."""

    def spoilt(change, family="language"):
        (model,) = models(bundle(family, "int8")).values()
        change(model.graph)
        return list(traps(model.graph))

    def unleveled(graph):
        node = next(node for node in graph.node if node.op_type == "MatMulNBits")
        (level,) = [a for a in node.attribute if a.name == "accuracy_level"]
        node.attribute.remove(level)

    def with_float_zeros(graph):
        node = next(node for node in graph.node if node.op_type == "MatMulNBits")
        node.input.append(node.input[2])

    def dynamic(graph):
        graph.node.append(helper.make_node("DynamicQuantizeLinear", ["x"], ["a", "b", "c"], "late"))

    assert [text.split()[0] for text in spoilt(unleveled)] == ["accuracy_level"]
    assert [text.split()[0] for text in spoilt(with_float_zeros)] == ["zero"]
    assert spoilt(dynamic) == ["DynamicQuantizeLinear late"]


@every_case
def test_the_same_bytes_every_time(bundle, family, scheme, tmp_path):
    again = quantize(bundle(family), scheme, tmp_path / "again")
    assert again.files == bundle(family, scheme).files
    assert again.digest == bundle(family, scheme).digest


def test_progress_counts_up_to_its_total(bundle, tmp_path):
    calls = []
    quantize(bundle("diffusion"), "int8", tmp_path / "out", progress=lambda *c: calls.append(c))
    done = [call[0] for call in calls]
    assert done == sorted(done)
    assert len({call[1] for call in calls}) == 1
    assert calls[-1][0] == calls[-1][1]
    assert all(call[2] for call in calls)


# What goes wrong leaves nothing


def test_a_quantized_bundle_is_not_quantized_again(bundle, tmp_path):
    with pytest.raises(UnknownSchemeError, match="is int8 already, expected fp32"):
        quantize(bundle("oneshot", "int8"), "int4", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_an_unknown_scheme_lists_what_there_is(bundle, tmp_path):
    with pytest.raises(UnknownSchemeError, match="'int5' is unknown: expected .*int8, int4"):
        quantize(bundle("oneshot"), "int5", tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture(scope="module", params=["flow/speech", "flow/density", "diffusion"])
def small(request, tmp_path_factory):
    """A bundle without a weight that is worth packing."""
    return tiny_bundles.BUILDERS[request.param](tmp_path_factory.mktemp("small"))


@every_scheme
def test_a_model_with_nothing_worth_packing_says_so(small, scheme, tmp_path):
    with pytest.raises(UnknownSchemeError, match=f"{scheme} fits no weight of bundle .*: use"):
        quantize(small, scheme, tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_exists_is_left_alone_unless_it_may_be_replaced(bundle, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    (out / "precious").write_text("data")
    for replace, said in ((False, "exists already"), (True, "--force replaces nothing else")):
        with pytest.raises(StorageError, match=said):
            quantize(bundle("oneshot"), "int8", out, replace=replace)
        assert [path.name for path in out.iterdir()] == ["precious"]
    (out / "precious").unlink()
    quantize(bundle("oneshot"), "int8", out)
    assert quantize(bundle("oneshot"), "int4", out, replace=True).scheme == "int4"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_an_interrupt_at_any_moment_leaves_nothing(bundle, tmp_path):
    calls = []
    exact = bundle("diffusion")
    good = quantize(exact, "int4", tmp_path / "good", progress=lambda *call: calls.append(call))
    for moment in range(len(calls) - 1):
        left = iter(range(moment))

        def interrupt(done, total, what, left=left):
            if next(left, None) is None:
                raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            quantize(exact, "int4", tmp_path / "out", progress=interrupt)
        assert [path.name for path in tmp_path.iterdir()] == ["good"]
    assert quantize(exact, "int4", tmp_path / "out").digest == good.digest


LIMITED = """
import resource, sys
from pathlib import Path
from leangen.bundle import open_bundle
from leangen.errors import StorageError
from leangen.quantize import quantize
exact, out = open_bundle(Path(sys.argv[1])), Path(sys.argv[2])
failed = 0
for limit in (0, 1000, 5000, 9000):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        quantize(exact, "int8", out)
    except StorageError as error:
        failed += "cannot write" in str(error) and str(out) in str(error)
    assert not list(out.parent.iterdir()), list(out.parent.iterdir())
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert quantize(exact, "int8", out).scheme == "int8"
print(failed)
"""


def test_a_full_disk_is_a_storage_error_that_leaves_nothing(bundle, tmp_path):
    exact, home = bundle("diffusion").path, tmp_path / "store"
    home.mkdir()
    temporary = tmp_path / "tmp"
    temporary.mkdir()
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, exact, home / "out"],
        capture_output=True,
        text=True,
        env={
            "PYTHONPATH": os.pathsep.join(sys.path),
            "PYTHONDONTWRITEBYTECODE": "1",
            "TMPDIR": str(temporary),
        },
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "4"
    assert list(temporary.glob("leangen-*")) == []
