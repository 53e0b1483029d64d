"""The operators for ONNX Runtime's CUDA provider, without a card.

The C sources are compiled once more with these operators on the CPU provider, beside a stand-in for
the driver that notes what is launched: it must be what `launches` says.
"""

import json
import os
import re
import shutil
import subprocess
import sys

import fake_card
import numpy as np
import pytest
from leangen_kernels import cache_layout, layout
from leangen_kernels.cuda import launches, tiles
from leangen_kernels.cuda.driver import NAMES

FAR = 1 << 24
"""Arguments from here on are addresses."""

RUN = """
import json, sys
import numpy as np, onnx, onnxruntime as ort
from onnx import helper

def run(given):
    arrays = {name: np.zeros(shape, kind) for name, (kind, shape) in given["inputs"].items()}
    info, kind = helper.make_tensor_value_info, helper.np_dtype_to_tensor_dtype
    names = [name if name in arrays else "" for name in given["order"]]
    node = helper.make_node(
        given["op"], names, given["outputs"], domain="leangen", **given["attributes"]
    )
    graph = helper.make_graph(
        [node], "one", [info(name, kind(a.dtype), a.shape) for name, a in arrays.items()],
        [onnx.ValueInfoProto(name=name) for name in given["outputs"]],
    )
    opsets = [helper.make_opsetid("", 21), helper.make_opsetid("leangen", 1)]
    proto = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    options = ort.SessionOptions()
    options.log_severity_level = 4
    options.register_custom_ops_library(sys.argv[1])
    session = ort.InferenceSession(proto.SerializeToString(), options)
    for _ in range(2):
        made = session.run(None, arrays)
    return [list(y.shape) for y in made]

for line in sys.stdin:
    try:
        told = {"shapes": run(json.loads(line))}
    except Exception as error:
        told = {"error": str(error)}
    print(json.dumps(told), flush=True)
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """A folder with the operators' library, kernels that are but names, and the stand-in."""
    folder = tmp_path_factory.mktemp("operators")
    fake_card.driver(folder)
    fake_card.names_only(folder / "cuda")
    return fake_card.operators(folder)


@pytest.fixture(scope="module")
def process(library):
    """One that runs operators as they are asked for."""
    with start(library) as started:
        yield started
        started.stdin.close()


def start(library, **settings):
    folder = library.parent
    environment = {
        **os.environ, "LD_LIBRARY_PATH": str(folder), "FAKE_CUDA_LOG": str(folder / "log"),
        "FAKE_CUDA_NAMES": str(folder / "cuda" / NAMES), **settings,
    }  # fmt: skip
    return subprocess.Popen(
        [sys.executable, "-c", RUN, library], env=environment, text=True,
        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
    )  # fmt: skip


def ask(process, library, given):
    """What the operator made, and what was launched in the second of two runs."""
    log = library.parent / "log"
    log.write_text("")
    process.stdin.write(json.dumps(given) + "\n")
    process.stdin.flush()
    told = json.loads(process.stdout.readline())
    lines = [line.split() for line in log.read_text().splitlines()]
    return told, lines[len(lines) // 2 :]


def shown(launch):
    """A launch as the stand-in notes it, addresses only as such."""
    numbers = [launch.grid[0], launch.grid[1], launch.grid[2], launch.threads]
    return [launch.name, *map(str, numbers), *(_argument(value) for value in launch.arguments)]


def _argument(value):
    number = float(value)
    return "address" if abs(number) >= FAR else f"{np.float32(number):.6g}"


def noted(line):
    """A line of the log likewise; a stream of the CPU is none."""
    assert line[5] == "0"
    return [*line[:5], *(_argument(value) for value in line[6:])]


class Addresses(dict):
    """One far away for everything that is given."""

    def __init__(self, names):
        super().__init__({name: FAR * (i + 2) for i, name in enumerate(names)})


LINEAR = ("x", "weights", "gain", "bias", "residual", "shift", "table")


@pytest.mark.parametrize(
    ("form", "n", "k", "tokens", "more", "attributes"),
    [
        ("q4", 4096, 4096, 1, ["gain"], {}),
        ("q4_min_wide", 40, 200, 9, ["bias", "residual"], {"activations": "fp32"}),
        ("q8_wide", 48, 64, 17, ["gain", "shift"], {"norm": "layer", "activation": "relu"}),
        ("q4", 28672, 64, 3, [], {"gated": 1, "activation": "gelu_tanh"}),
        ("q4", 28672, 64, 300, [], {}),
        ("nf4_wide", 16, 32, 2, ["table"], {"epsilon": 0.5}),
    ],
)
def test_a_linear_layer_launches_what_python_says(
    process, library, form, n, k, tokens, more, attributes
):
    held = layout.FORMS[form]
    outputs = n // 2 if attributes.get("gated") else n
    op = launches.Linear(
        held, n, k, attributes.get("activations", "int8"), attributes.get("norm") == "layer",
        attributes.get("epsilon", 1e-5), bool(attributes.get("gated")),
        attributes.get("activation", "none"),
    )  # fmt: skip
    sizes = {"gain": [k], "shift": [k], "bias": [outputs], "residual": [1, tokens, outputs],
             "table": [16]}  # fmt: skip
    inputs = {"x": ["float32", [1, tokens, k]],
              "weights": ["uint8", [tiles.packed_bytes(held, n, k)]]}  # fmt: skip
    inputs |= {name: ["float32", sizes[name]] for name in more}
    given = {"op": "CudaLinear", "inputs": inputs, "order": LINEAR, "outputs": ["y"],
             "attributes": {"n": n, "k": k, "form": form, **attributes}}  # fmt: skip
    told, lines = ask(process, library, given)
    assert told == {"shapes": [[1, tokens, outputs]]}
    at = Addresses([*inputs, "y", "scratch"])
    wanted = op.launches(tokens, at, 132)
    assert [noted(line) for line in lines] == [shown(launch) for launch in wanted]
    rows, scales, sums = (int(value) for value in lines[0][9:12])
    ours = wanted[0].arguments
    assert (scales - rows, sums - scales) == (ours[4] - ours[3], ours[5] - ours[4])
    assert [int(value) for value in lines[1][6:9]] == [rows, scales, sums]


@pytest.mark.parametrize(("major", "overlap"), [("8", False), ("9", True), ("12", True)])
def test_launches_overlap_where_the_card_can(library, major, overlap):
    with start(library, FAKE_CUDA_MAJOR=major, FAKE_CUDA_OVERLAPS="1") as other:
        told, lines = ask(other, library, GOOD)
        other.stdin.close()
    assert told == {"shapes": [[1, 16]]}
    assert [line[0] == "overlaps" for line in lines] == (
        [True, False] * 2 if overlap else [False] * 2
    )


ATTENTION = ("qkv", "key", "value", "last", "cosines", "sines", "query_gain", "key_gain")


@pytest.mark.parametrize(
    ("cache", "width", "heads", "kv_heads", "batch", "new", "more"),
    [("fp16", 64, 9, 3, 1, 1, ["cosines", "sines"]),
     ("int8", 128, 32, 8, 2, 5, ["query_gain", "key_gain"])],
)  # fmt: skip
def test_attention_launches_what_python_says(
    process, library, cache, width, heads, kv_heads, batch, new, more
):
    capacity, held = 512, cache_layout.CACHES[cache]
    shape = [batch, kv_heads, capacity, held.columns(width)]
    sizes = {"cosines": [capacity, width // 2], "sines": [capacity, width // 2],
             "query_gain": [width], "key_gain": [width]}  # fmt: skip
    inputs = {
        "qkv": ["float32", [batch, new, (heads + 2 * kv_heads) * width]],
        "key": [held.dtype.name, shape], "value": [held.dtype.name, shape],
        "last": ["int32", [batch]], **{name: ["float32", sizes[name]] for name in more},
    }  # fmt: skip
    attributes = {"heads": heads, "kv_heads": kv_heads, "window": 7, "cache": cache}
    given = {"op": "CudaAttention", "inputs": inputs, "order": ATTENTION,
             "outputs": ["y", "new_key", "new_value"], "attributes": attributes}  # fmt: skip
    told, lines = ask(process, library, given)
    assert told == {"shapes": [[batch, new, heads * width], shape, shape]}
    assert lines[:2] == [["copy"], ["copy"]]  # caches that are not bound to one place
    names = {"key": "keys", "value": "values"}
    at = Addresses([*(names.get(name, name) for name in inputs), "y", "scratch"])
    op = launches.Attention(heads, kv_heads, width, cache, window=7)
    wanted = op.launches(batch, new, capacity, at, 132)
    assert [noted(line) for line in lines[2:]] == [shown(launch) for launch in wanted]
    q, parts = int(lines[2][12]), int(lines[3][10])
    splits = op.splits(batch, new, capacity, 132)
    assert parts - q == op.scratch(batch, new, splits)[0]


GOOD = {
    "op": "CudaLinear", "order": LINEAR, "outputs": ["y"],
    "inputs": {"x": ["float32", [1, 32]], "weights": ["uint8", [1152]]},
    "attributes": {"n": 16, "k": 32, "form": "q4"},
}  # fmt: skip


@pytest.mark.parametrize(
    ("changed", "settings", "says"),
    [
        ({}, {"LD_LIBRARY_PATH": ""}, "no NVIDIA driver: libcuda.so.1 cannot be loaded"),
        ({}, {"FAKE_CUDA_BYTES": "1"}, "a workspace: out of memory .2.; a lower-bit scheme"),
        ({}, {"FAKE_CUDA_NAMES": ""}, "leangen_rows_a8: something is wrong"),
        ({"form": "q4_g16"}, {}, "form 'q4_g16', expected one of q4, q4_wide"),
        ({"k": 31}, {}, "x has 32 columns, expected 31"),
        ({"n": 17}, {}, "weights have 1152 bytes, expected 2304"),
        ({"k": 20000}, {}, "expected k up to 16384"),
    ],
)
def test_what_cannot_run_is_said(process, library, changed, settings, says):
    if settings.get("LD_LIBRARY_PATH") == "" and shutil.which("nvidia-smi"):
        pytest.skip("there is a driver")
    given = {**GOOD, "attributes": {**GOOD["attributes"], **changed}}
    if settings:
        with start(library, **settings) as other:
            told, _ = ask(other, library, given)
            other.stdin.close()
    else:
        told, _ = ask(process, library, given)
    assert re.search(says, told["error"])
