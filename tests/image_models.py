"""Tiny image models for tests: a denoiser with every kind of layer, a generator, an oracle."""

import numpy as np
from onnx import TensorProto, helper, numpy_helper, save


def value(name, shape, kind=TensorProto.FLOAT):
    return helper.make_tensor_value_info(name, kind, shape)


def model(nodes, inputs, outputs, constants, opset=18):
    graph = helper.make_graph(
        nodes,
        "tiny",
        inputs,
        outputs,
        [numpy_helper.from_array(np.asarray(array), name) for name, array in constants.items()],
    )
    opsets = [helper.make_opsetid("", opset), helper.make_opsetid("com.microsoft", 1)]
    return helper.make_model(graph, opset_imports=opsets, ir_version=8)


def weights(rng, *shape):
    fan_in = np.prod(shape[1:])
    return (rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)


def denoiser(path, seed=0):
    """Convolutions, a transposed one and a linear layer: noisy, sigma, tilt -> denoised."""
    rng = np.random.default_rng(seed)
    node = helper.make_node
    nodes = [
        node("Conv", ["noisy", "w_in", "b_in"], ["h0"], "/in", pads=[1, 1, 1, 1]),
        node("Relu", ["h0"], ["h1"]),
        node("Concat", ["sigma", "tilt"], ["level"], axis=0),
        node("Unsqueeze", ["level", "zero"], ["level_row"]),
        node("Gemm", ["level_row", "w_embed", "b_embed"], ["embed"], "/embed", transB=1),
        node("Relu", ["embed"], ["embed_on"]),
        node("Gemm", ["embed_on", "w_emb", "b_emb"], ["emb"], "/emb", transB=1),
        node("Unsqueeze", ["emb", "places"], ["emb_map"]),
        node("Conv", ["h1", "w_mid", "b_mid"], ["h2"], "/mid", pads=[1, 1, 1, 1], strides=[2, 2]),
        node("Add", ["h2", "emb_map"], ["h3"]),
        node("Relu", ["h3"], ["h4"]),
        node("Conv", ["h4", "w_deep"], ["h5"], "/deep", pads=[1, 1, 1, 1]),
        node("Relu", ["h5"], ["h6"]),
        node("ConvTranspose", ["h6", "w_up", "b_up"], ["h7"], "/up", strides=[2, 2]),
        node("Add", ["h7", "h1"], ["h8"]),
        node("Conv", ["h8", "w_out", "b_out"], ["denoised"], "/out", pads=[1, 1, 1, 1]),
    ]
    constants = {
        "w_in": weights(rng, 16, 1, 3, 3),
        "b_in": rng.standard_normal(16).astype(np.float32) / 10,
        "w_embed": weights(rng, 64, 2) / 40,
        "b_embed": rng.standard_normal(64).astype(np.float32),
        "w_emb": weights(rng, 32, 64),
        "b_emb": np.zeros(32, np.float32),
        "w_mid": weights(rng, 32, 16, 3, 3),
        "b_mid": rng.standard_normal(32).astype(np.float32) / 10,
        "w_deep": weights(rng, 32, 32, 3, 3),
        "w_up": weights(rng, 32, 16, 2, 2),
        "b_up": np.zeros(16, np.float32),
        "w_out": weights(rng, 1, 16, 3, 3) / 100,
        "b_out": np.zeros(1, np.float32),
        "zero": np.array([0]),
        "places": np.array([2, 3]),
    }
    inputs = [value("noisy", ["b", 1, 16, 16]), value("sigma", ["b"]), value("tilt", ["b"])]
    save(model(nodes, inputs, [value("denoised", ["b", 1, 16, 16])], constants), path)
    return path


def generator(path, seed=0):
    """z [b, 8] -> image [b, 3, 4, 4] in -1..1."""
    rng = np.random.default_rng(seed)
    nodes = [
        helper.make_node("Gemm", ["z", "w"], ["flat"], "/fc"),
        helper.make_node("Reshape", ["flat", "shape"], ["map"]),
        helper.make_node("Tanh", ["map"], ["image"]),
    ]
    constants = {"w": weights(rng, 8, 48), "shape": np.array([-1, 3, 4, 4])}
    save(model(nodes, [value("z", ["b", 8])], [value("image", ["b", 3, 4, 4])], constants), path)
    return path


def gaussian_denoiser(path, mean, std):
    """The exact denoiser of pixels drawn from N(mean, std^2), conditioned on sigma."""
    nodes = [
        helper.make_node("Mul", ["sigma", "sigma"], ["s2"]),
        helper.make_node("Mul", ["s2", "mean"], ["s2_mean"]),
        helper.make_node("Mul", ["noisy", "var"], ["x_var"]),
        helper.make_node("Add", ["x_var", "s2_mean"], ["top"]),
        helper.make_node("Add", ["s2", "var"], ["bottom"]),
        helper.make_node("Div", ["top", "bottom"], ["denoised"]),
    ]
    constants = {"mean": np.float32([mean]), "var": np.float32([std**2])}
    inputs = [value("noisy", ["b", 1, 16, 16]), value("sigma", ["b"])]
    save(model(nodes, inputs, [value("denoised", ["b", 1, 16, 16])], constants), path)
    return path
