"""ATen's layers in ONNX: linear layers, embeddings, convolutions, pooling, resizing, norms."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from leangen.errors import UnsupportedError
from leangen.exporters.torch_emitter import Array, Emitter, registry
from leangen.exporters.torch_trace import Constant, Op, Tensor

Arguments = Mapping[str, Any]
CONVERSIONS, aten = registry()

# Linear layers


@aten("mm", "bmm", "mv")
def _product(e: Emitter, a: Arguments, op: Op) -> str:
    return _matmul(e, a["self"], a.get("mat2", a.get("vec")))


@aten("addmm", "baddbmm")
def _added_product(e: Emitter, a: Arguments, op: Op) -> str:
    x = a.get("mat1", a.get("batch1"))
    made = _matmul(e, x, a.get("mat2", a.get("batch2")))
    if a["alpha"] != 1:
        made = e.op("Mul", made, e.name(a["alpha"], a["self"].dtype))
    if a["beta"] == 0:
        return made
    added = e.name(a["self"], a["self"].dtype)
    if a["beta"] != 1:
        added = e.op("Mul", added, e.name(a["beta"], a["self"].dtype))
    return e.op("Add", made, added)


def _matmul(e: Emitter, x: Tensor, y: Tensor) -> str:
    if isinstance(y, Constant) and y.tensor.dim() == 2:
        weight = e.weight(y)
        return e.weighted("MatMul", weight, e.name(x), weight)
    if isinstance(x, Constant) and x.tensor.dim() == 2 and len(y.shape) == 2:
        # W y^T as (y W^T)^T, so that the weight stands where layers have theirs
        weight = e.weight(Constant(x.tensor.t(), x.name))
        turned = e.op("Transpose", e.name(y), perm=[1, 0])
        return e.op("Transpose", e.weighted("MatMul", weight, turned, weight), perm=[1, 0])
    return e.op("MatMul", e.name(x), e.name(y))


@aten("triangular_solve", "linalg_solve_triangular", "_linalg_solve_ex")
def _solve(e: Emitter, a: Arguments, op: Op) -> str | list[str]:
    """A system with a constant matrix: the product with its inverse, computed here in float64."""
    if op.name == "triangular_solve":
        matrix, right = a["A"], a["self"]
    elif op.name == "linalg_solve_triangular":
        matrix, right = a["self"], a["B"]
    else:
        matrix, right = a["A"], a["B"]
    if not isinstance(matrix, Constant) or matrix.tensor.dim() != 2 or a.get("left") is False:
        raise UnsupportedError(
            f"{op.where}: ONNX has no operator that solves a linear system, and this one's matrix "
            "is computed from the input: not exported"
        )
    system = matrix.tensor.double()
    if "upper" in a:
        system = system.triu() if a["upper"] else system.tril()
        system = system.t() if a.get("transpose") else system
        if a["unitriangular"]:
            system = system - torch.diag(system.diagonal()) + torch.eye(len(system)).double()
    inverse = Constant(torch.linalg.inv(system).to(matrix.dtype))
    return _matmul(e, inverse, right)


@aten("embedding")
def _embedding(e: Emitter, a: Arguments, op: Op) -> str:
    table = e.weight(a["weight"]) if isinstance(a["weight"], Constant) else e.name(a["weight"])
    return e.weighted("Gather", table, table, e.name(a["indices"]), axis=0)


# Convolutions and what stands around them


@aten("convolution")
def _convolution(e: Emitter, a: Arguments, op: Op) -> str:
    if not isinstance(a["weight"], Constant):
        raise UnsupportedError(
            f"{op.where}: a convolution whose weight is computed from the input: not exported"
        )
    weight = e.weight(a["weight"])
    inputs = [e.name(a["input"]), weight]
    if a["bias"] is not None:
        inputs.append(e.name(a["bias"]))
    options: dict[str, Any] = {
        "strides": list(a["stride"]),
        "pads": [*a["padding"], *a["padding"]],
        "dilations": list(a["dilation"]),
        "group": a["groups"],
    }
    if a["transposed"]:
        options["output_padding"] = list(a["output_padding"])
        return e.weighted("ConvTranspose", weight, *inputs, **options)
    return e.weighted("Conv", weight, *inputs, **options)


@aten("max_pool2d_with_indices", "avg_pool2d")
def _pool(e: Emitter, a: Arguments, op: Op) -> str:
    kernel = _pair(a["kernel_size"])
    options: dict[str, Any] = {
        "kernel_shape": kernel,
        "strides": _pair(a["stride"]) if a["stride"] else kernel,
        "pads": _pair(a["padding"]) * 2,
        "ceil_mode": int(a["ceil_mode"]),
    }
    if op.name == "avg_pool2d":
        options["count_include_pad"] = int(a["count_include_pad"])
        return e.op("AveragePool", e.name(a["self"]), **options)
    return e.op("MaxPool", e.name(a["self"]), dilations=_pair(a["dilation"]), **options)


def _pair(size: Any) -> list[int]:
    sizes = [size] if isinstance(size, int) else list(size)
    return sizes * 2 if len(sizes) == 1 else sizes


@aten("_adaptive_avg_pool2d")
def _adaptive_pool(e: Emitter, a: Arguments, op: Op) -> str:
    sizes, wanted = a["self"].shape[-2:], a["output_size"]
    if any(size % target for size, target in zip(sizes, wanted, strict=True)):
        raise UnsupportedError(
            f"{op.where}: {list(sizes)} pixels are pooled to {list(wanted)}: expected whole blocks"
        )
    block = [size // target for size, target in zip(sizes, wanted, strict=True)]
    return e.op("AveragePool", e.name(a["self"]), kernel_shape=block, strides=block)


@aten("upsample_nearest2d", "upsample_bilinear2d", "upsample_bicubic2d")
def _upsample(e: Emitter, a: Arguments, op: Op) -> str:
    out = op.outputs[0]
    assert out is not None  # the schema has one output
    sizes = [a["self"].shape[1], *out.shape[2:]]
    scale = [1.0, *(b / s for b, s in zip(sizes, a["self"].shape[1:], strict=True))]
    if not a.get("align_corners"):
        # What was asked for, not what it comes to in whole pixels, says where pixels are read.
        scale[2:] = [a.get(f"scales_{k}") or s for k, s in zip("hw", scale[2:], strict=True)]
    mode = {"nearest": "nearest", "bilinear": "linear", "bicubic": "cubic"}
    kind = op.name.removeprefix("upsample_").rstrip("12d")
    corners = "align_corners" if a.get("align_corners") else "half_pixel"
    options: dict[str, Any] = {"coordinate_transformation_mode": corners}
    if kind == "nearest":
        options = {"coordinate_transformation_mode": "asymmetric", "nearest_mode": "floor"}
    elif kind == "bicubic":
        options["cubic_coeff_a"] = -0.75
    name, scales = e.name(a["self"]), e.const(scale, np.float32)
    return e.op("Resize", name, "", scales, mode=mode[kind], **options)


# Norms


@aten("native_layer_norm")
def _layer_norm(e: Emitter, a: Arguments, op: Op) -> str:
    sizes = list(a["normalized_shape"])
    scale = e.name(a["weight"]) if a["weight"] else e.const(np.ones(sizes), np.float32)
    inputs = [e.name(a["input"]), scale]
    inputs += [e.name(a["bias"])] if a["bias"] else []
    return e.op("LayerNormalization", *inputs, axis=-len(sizes), epsilon=a["eps"])


@aten("native_group_norm")
def _group_norm(e: Emitter, a: Arguments, op: Op) -> str:
    x, groups = a["input"], a["group"]
    flat = e.op("Reshape", e.name(x), e.const([0, groups, -1]))
    ones, zeros = e.const(np.ones(groups), np.float32), e.const(np.zeros(groups), np.float32)
    made = e.op("InstanceNormalization", flat, ones, zeros, epsilon=a["eps"])
    made = e.reshape(made, x.shape)
    for kind, name in (("Mul", "weight"), ("Add", "bias")):
        if a[name] is not None:
            column = a[name].tensor.detach().reshape(-1, *[1] * (len(x.shape) - 2))
            made = e.op(kind, made, e.name(Constant(column)))
    return made


@aten("native_batch_norm")
def _batch_norm(e: Emitter, a: Arguments, op: Op) -> str:
    x = a["input"]
    tall = [1, -1, *[1] * (len(x.shape) - 2)]
    if a["training"]:
        raise UnsupportedError(
            f"{op.where}: batch normalization in training mode, where samples depend on each other "
            "(or instance normalization, which torch computes so): call the module's eval() with "
            "running statistics, or use GroupNorm(channels, channels)"
        )
    mean, spread = a["running_mean"].tensor, a["running_var"].tensor
    scale: Any = torch.rsqrt(spread.double() + a["eps"])
    scale = scale if a["weight"] is None else scale * a["weight"].tensor.detach()
    shift = -mean * scale
    shift = shift if a["bias"] is None else shift + a["bias"].tensor.detach()
    column: list[Array] = [t.float().reshape(tall[1:]).numpy() for t in (scale, shift)]
    scaled = e.op("Mul", e.name(x), e.const(column[0], np.float32))
    return e.op("Add", scaled, e.const(column[1], np.float32))
