"""Tiny flows that the tests build: a Piper voice with random weights, and pzflow states."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

SYMBOLS = "_^$ abcdefgˈ.,\u0303"
RATE_HZ = 8000
HOP = 4
"""Samples per frame of the tiny voice."""


def drain(steps):
    """All steps of a family's run, and its output."""
    seen = []
    while True:
        try:
            seen.append(next(steps))
        except StopIteration as stop:
            return seen, stop.value


def voice_json() -> dict:
    """A voice's JSON with one id per symbol."""
    return {
        "audio": {"sample_rate": RATE_HZ, "quality": "tiny"},
        "espeak": {"voice": "en-us"},
        "inference": {"noise_scale": 0.5, "length_scale": 1.0, "noise_w": 0.4},
        "num_symbols": len(SYMBOLS),
        "num_speakers": 1,
        "speaker_id_map": {},
        "phoneme_id_map": {symbol: [i] for i, symbol in enumerate(SYMBOLS)},
    }


def write_voice(folder: Path, *, speakers: int = 1, width: int = 4) -> Path:
    """A random VITS of Piper's structure and node names: a few hundred weights, 4 channels."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "tiny.onnx"
    onnx.save(voice_model(speakers, width), path)
    config = voice_json()
    if speakers > 1:
        config |= {"num_speakers": speakers, "speaker_id_map": {"ann": 0, "bob": 1}}
    path.with_name("tiny.onnx.json").write_text(json.dumps(config), encoding="utf-8")
    return path


def voice_model(speakers: int = 1, width: int = 4) -> onnx.ModelProto:
    """The graph: text encoder, duration predictor, alignment, flow, decoder; batch 1."""
    rng = np.random.default_rng(7)
    nodes, constants = [], {}

    def const(value, dtype=np.int64):
        array = np.asarray(value, dtype)
        name = f"c{array.dtype}{array.tolist()}"
        constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(name, *shape):
        array = rng.normal(0, 1 / np.sqrt(width), shape).astype(np.float32)
        constants[name] = numpy_helper.from_array(array, name)
        return name

    def op(kind, name, *inputs, outputs=1, **attributes):
        names = [f"{name}_output_{i}" for i in range(outputs)]
        nodes.append(helper.make_node(kind, inputs, names, name=name, **attributes))
        return names[0] if outputs == 1 else names

    def mask(scope, length, lengths):
        """[1, 1, length], one where the place is below `lengths` [1]."""
        places = op("Range", f"{scope}/Range", const(0), length, const(1))
        row = op("Unsqueeze", f"{scope}/Unsqueeze_a", places, const([0]))
        ends = op("Unsqueeze", f"{scope}/Unsqueeze_b", lengths, const([1]))
        below = op("Less", f"{scope}/Less", row, ends)
        lifted = op("Unsqueeze", f"{scope}/Unsqueeze_c", below, const([1]))
        return op("Cast", f"{scope}/Cast_mask", lifted, to=TensorProto.FLOAT)

    def conv(scope, x, out, inside):
        w = weight(scope.strip("/").replace("/", ".") + ".weight", out, inside, 1)
        return op("Conv", f"{scope}/Conv", x, w)

    noise_scale, length_scale, noise_w = (
        op("Gather", f"/Gather_{i}", "scales", const(i), axis=0) for i in range(3)
    )
    # the name `sid` belongs to a weight in a voice of one speaker, as in published ones
    table = weight("sid" if speakers == 1 else "enc_p.emb.weight", len(SYMBOLS), 2 * width)
    embedded = op("Gather", "/enc_p/emb/Gather", table, "input")
    hidden = op("Transpose", "/enc_p/Transpose", embedded, perm=[0, 2, 1])
    shape = op("Shape", "/enc_p/Shape", hidden)
    count = op("Gather", "/enc_p/Gather_count", shape, const(2))
    phoneme_mask = mask("/enc_p", count, "input_lengths")
    hidden = op("Mul", "/enc_p/Mul", hidden, phoneme_mask)
    if speakers > 1:
        voice = op("Gather", "/emb_g/Gather", weight("emb_g.weight", speakers, 2 * width), "sid")
        voice = op("Unsqueeze", "/Unsqueeze_g", voice, const([2]))
        hidden = op("Add", "/enc_p/Add_g", hidden, voice)
    stats = conv("/enc_p/proj", hidden, 2 * width, 2 * width)
    mean, log_scale = op("Split", "/enc_p/Split", stats, outputs=2, axis=1)

    size = op(
        "Concat",
        "/dp/Concat_size",
        const([1, 2]),
        op("Unsqueeze", "/dp/Unsqueeze_size", count, const([0])),
        axis=0,
    )
    zeros = op("ConstantOfShape", "/dp/ConstantOfShape", size)
    noise = op("RandomNormalLike", "/dp/RandomNormalLike", zeros, dtype=TensorProto.FLOAT)
    noise = op("Mul", "/dp/Mul_noise", noise, noise_w)
    joined = op("Concat", "/dp/Concat", hidden, noise, axis=1)
    log_frames = conv("/dp/proj", joined, 1, 2 * width + 2)
    frames = op("Mul", "/Mul", op("Exp", "/Exp", log_frames), phoneme_mask)
    frames = op("Ceil", "/Ceil", op("Mul", "/Mul_1", frames, length_scale))

    summed = op("ReduceSum", "/ReduceSum", frames, const([1, 2]), keepdims=0)
    total = op("Cast", "/Cast", summed, to=TensorProto.INT64)
    longest = op("ReduceMax", "/ReduceMax", total, keepdims=0)
    frame_mask = mask("", longest, total)
    ends = op("CumSum", "/CumSum", frames, const(2))
    starts = op("Sub", "/Sub_starts", ends, frames)
    places = op(
        "Cast",
        "/Cast_places",
        op("Range", "/Range_t", const(0), longest, const(1)),
        to=TensorProto.FLOAT,
    )
    places = op("Unsqueeze", "/Unsqueeze_places", places, const([0, 2]))
    before = op("Cast", "/Cast_e", op("Less", "/Less_e", places, ends), to=TensorProto.FLOAT)
    early = op("Cast", "/Cast_s", op("Less", "/Less_s", places, starts), to=TensorProto.FLOAT)
    alignment = op("Sub", "/Sub", before, early)

    def repeat(tag, x):
        columns = op("Transpose", f"/Transpose_in{tag}", x, perm=[0, 2, 1])
        product = op("MatMul", f"/MatMul{tag}", alignment, columns)
        return op("Transpose", f"/Transpose_out{tag}", product, perm=[0, 2, 1])

    mean, log_scale = repeat("", mean), repeat("_1", log_scale)
    noise = op("RandomNormalLike", "/RandomNormalLike", mean, dtype=TensorProto.FLOAT)
    spread = op("Mul", "/Mul_5", noise, op("Exp", "/Exp_1", log_scale))
    prior = op("Add", "/Add", mean, op("Mul", "/Mul_6", spread, noise_scale))

    x = conv("/flow/flows.0/pre", prior, width, width)
    x = op("Mul", "/flow/flows.0/Mul", x, frame_mask)
    none = op(
        "ConstantOfShape", "/flow/flows.0/ConstantOfShape", op("Shape", "/flow/flows.0/Shape", x)
    )
    x = op("Add", "/flow/flows.0/Add", op("Tanh", "/flow/flows.0/Tanh", x), none)
    x = op("Mul", "/Mul_7", op("Add", "/flow/flows.0/Add_1", x, prior), frame_mask)
    x = conv("/dec/conv_pre", x, width, width)
    if speakers > 1:
        x = op("Add", "/dec/Add_g", x, conv("/dec/cond", voice, width, 2 * width))
    x = op(
        "ConvTranspose",
        "/dec/ups.0/ConvTranspose",
        x,
        weight("dec.ups.0.weight", width, 1, HOP),
        strides=[HOP],
    )
    x = op("Tanh", "/dec/Tanh", x)
    nodes.append(helper.make_node("Unsqueeze", [x, const([1])], ["output"], name="/Unsqueeze_11"))

    inputs = [
        helper.make_tensor_value_info("input", TensorProto.INT64, ["batch", "phonemes"]),
        helper.make_tensor_value_info("input_lengths", TensorProto.INT64, ["batch"]),
        helper.make_tensor_value_info("scales", TensorProto.FLOAT, [3]),
    ]
    if speakers > 1:
        inputs.append(helper.make_tensor_value_info("sid", TensorProto.INT64, ["batch"]))
    graph = helper.make_graph(
        nodes,
        "voice",
        inputs,
        [helper.make_tensor_value_info("output", TensorProto.FLOAT, ["batch", 1, 1, "time"])],
        list(constants.values()),
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 15)], ir_version=8)


def coupling_info(bins=8, bound=5, transformed=None):
    """pzflow's description of one spline coupling with two hidden layers of 16."""
    return ("NeuralSplineCoupling", (bins, bound, 2, 16, transformed, 0, False))


def flow_state(parts, dim, *, latent=None, seed=0):
    """The state that pzflow's Flow.save pickles, with random weights for each coupling."""
    rng = np.random.default_rng(seed)
    params = []
    for kind, arguments in parts:
        if kind != "NeuralSplineCoupling":
            params.append(())
            continue
        bins, _, _, hidden, transformed, _, _ = arguments
        upper = dim // 2 if transformed is None else dim - transformed
        sizes = [upper, hidden, hidden, (dim - upper) * (3 * bins - 1)]
        layers = []
        for k, n in zip(sizes, sizes[1:], strict=False):
            scale = 0.4 / np.sqrt(k)  # gentle: steep splines would amplify fp32 rounding
            layers += [
                (
                    rng.normal(0, scale, (k, n)).astype(np.float32),
                    rng.normal(0, 0.3, n).astype(np.float32),
                ),
                (),
            ]
        params.append(layers[:-1])
    return {
        "class": "Flow",
        "data_columns": tuple(f"c{i}" for i in range(dim)),
        "conditional_columns": None,
        "latent_info": latent or ("Uniform", (dim, 5)),
        "bijector_info": ("Chain", tuple(parts)),
        "params": ((), params),
    }
