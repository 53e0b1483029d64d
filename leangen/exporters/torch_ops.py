"""ATen's arithmetic in ONNX: element by element, reductions, linear layers, convolutions, norms."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from leangen.errors import UnsupportedError
from leangen.exporters.torch_emitter import Array, Emitter, aten
from leangen.exporters.torch_trace import Batch, Constant, Op, Tensor, Value

Arguments = Mapping[str, Any]

_UNARY = {
    "abs": "Abs",
    "neg": "Neg",
    "exp": "Exp",
    "log": "Log",
    "sqrt": "Sqrt",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
    "sign": "Sign",
    "sgn": "Sign",
    "erf": "Erf",
    "sin": "Sin",
    "cos": "Cos",
    "tan": "Tan",
    "asin": "Asin",
    "acos": "Acos",
    "atan": "Atan",
    "sinh": "Sinh",
    "cosh": "Cosh",
    "tanh": "Tanh",
    "asinh": "Asinh",
    "acosh": "Acosh",
    "atanh": "Atanh",
    "sigmoid": "Sigmoid",
    "relu": "Relu",
    "reciprocal": "Reciprocal",
    "isnan": "IsNaN",
    "isinf": "IsInf",
    "logical_not": "Not",
    "bitwise_not": "Not",
    "hardswish": "HardSwish",
}
_BINARY = {
    "mul": "Mul",
    "div": "Div",
    "maximum": "Max",
    "minimum": "Min",
    "lt": "Less",
    "gt": "Greater",
    "le": "LessOrEqual",
    "ge": "GreaterOrEqual",
    "eq": "Equal",
    "logical_and": "And",
    "logical_or": "Or",
    "logical_xor": "Xor",
    "bitwise_and": "And",
    "bitwise_or": "Or",
}
_LOGICAL = frozenset({"And", "Or", "Xor"})


@aten(*_UNARY)
def _unary(e: Emitter, a: Arguments, op: Op) -> str:
    kind = _UNARY[op.name]
    return e.op(kind, e.name(a["self"], torch.bool if kind == "Not" else None))


@aten(*_BINARY)
def _binary(e: Emitter, a: Arguments, op: Op) -> str:
    kind = _BINARY[op.name]
    dtype = torch.bool if kind in _LOGICAL else _common(op)
    if kind == "Div":
        dtype = op.outputs[0].dtype if op.outputs[0] is not None else dtype
    elif kind == "Mul" and dtype == torch.bool:
        kind = "And"
    made = e.op(kind, e.name(a["self"], dtype), e.name(a["other"], dtype))
    if kind == "Div" and a.get("rounding_mode"):
        return e.op("Floor" if a["rounding_mode"] == "floor" else "Trunc", made)
    return made


@aten("add", "sub", "rsub")
def _add(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _common(op)
    x, y = e.name(a["self"], dtype), e.name(a["other"], dtype)
    if a["alpha"] != 1:
        scaled = "self" if op.name == "rsub" else "other"
        factor = e.name(a["alpha"], dtype)
        x, y = (e.op("Mul", x, factor), y) if scaled == "self" else (x, e.op("Mul", y, factor))
    if op.name == "rsub":
        return e.op("Sub", y, x)
    return e.op("Add" if op.name == "add" else "Sub", x, y)


@aten("ne")
def _not_equal(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _common(op)
    return e.op("Not", e.op("Equal", e.name(a["self"], dtype), e.name(a["other"], dtype)))


@aten("pow")
def _pow(e: Emitter, a: Arguments, op: Op) -> str:
    x, power = a["self"], a["exponent"]
    if power == 2 and not isinstance(power, Value | Constant):
        name = e.name(x)
        return e.op("Mul", name, name)
    dtype = _common(op) if isinstance(x, Value | Constant) else power.dtype
    return e.op("Pow", e.name(x, dtype), e.name(power, dtype))


@aten("remainder", "fmod")
def _remainder(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _common(op)
    x, y = e.name(a["self"], dtype), e.name(a["other"], dtype)
    if op.name == "fmod" or not dtype.is_floating_point:
        return e.op("Mod", x, y, fmod=int(op.name == "fmod"))
    return e.op("Sub", x, e.op("Mul", y, e.op("Floor", e.op("Div", x, y))))


@aten("rsqrt")
def _rsqrt(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Reciprocal", e.op("Sqrt", e.name(a["self"])))


@aten("log1p", "expm1")
def _near_one(e: Emitter, a: Arguments, op: Op) -> str:
    """In float64, where nothing near zero is lost."""
    x, one = e.cast(e.name(a["self"]), torch.float64), e.const(1.0, np.float64)
    made = (
        e.op("Log", e.op("Add", x, one)) if op.name == "log1p" else e.op("Sub", e.op("Exp", x), one)
    )
    return e.cast(made, a["self"].dtype)


@aten("addcmul", "addcdiv")
def _addc(e: Emitter, a: Arguments, op: Op) -> str:
    kind = "Mul" if op.name == "addcmul" else "Div"
    made = e.op(kind, e.name(a["tensor1"]), e.name(a["tensor2"]))
    if a["value"] != 1:
        made = e.op("Mul", made, e.const(a["value"], np.float32))
    return e.op("Add", e.name(a["self"]), made)


@aten("lerp")
def _lerp(e: Emitter, a: Arguments, op: Op) -> str:
    start, weight = e.name(a["self"]), e.name(a["weight"], a["self"].dtype)
    return e.op("Add", start, e.op("Mul", weight, e.op("Sub", e.name(a["end"]), start)))


@aten("where")
def _where(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = op.outputs[0].dtype if op.outputs[0] is not None else torch.float32
    names = e.name(a["self"], dtype), e.name(a["other"], dtype)
    return e.op("Where", e.name(a["condition"], torch.bool), *names)


@aten("masked_fill")
def _masked_fill(e: Emitter, a: Arguments, op: Op) -> str:
    x = a["self"]
    return e.op("Where", e.name(a["mask"]), e.name(a["value"], x.dtype), e.name(x))


@aten("clamp", "clamp_min", "clamp_max", "hardtanh")
def _clamp(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    ends = a.get("min", a.get("min_val")), a.get("max", a.get("max_val"))
    for kind, end in zip(("Max", "Min"), ends, strict=True):
        if end is not None:
            x = e.op(kind, x, e.name(end, a["self"].dtype))
    return x


# Activations


@aten("leaky_relu", "elu", "celu")
def _with_alpha(e: Emitter, a: Arguments, op: Op) -> str:
    kind = {"leaky_relu": "LeakyRelu", "elu": "Elu", "celu": "Celu"}[op.name]
    if op.name == "elu" and (a["scale"] != 1 or a["input_scale"] != 1):
        gamma, alpha = float(a["scale"]), float(a["alpha"])
        return e.op("Selu", e.name(a["self"]), alpha=alpha, gamma=gamma)
    return e.op(kind, e.name(a["self"]), alpha=float(a.get("negative_slope", a.get("alpha"))))


@aten("silu")
def _silu(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    return e.op("Mul", x, e.op("Sigmoid", x))


@aten("gelu")
def _gelu(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Gelu", e.name(a["self"]), approximate=a["approximate"])


@aten("mish")
def _mish(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Mish", e.name(a["self"]))


@aten("hardsigmoid")
def _hardsigmoid(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("HardSigmoid", e.name(a["self"]), alpha=1 / 6, beta=0.5)


@aten("_prelu_kernel")
def _prelu(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("PRelu", e.name(a["self"]), e.name(a["weight"]))


@aten("softplus")
def _softplus(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    if a["beta"] == 1:
        return e.op("Softplus", x)
    beta = e.const(a["beta"], np.float32)
    return e.op("Div", e.op("Softplus", e.op("Mul", x, beta)), beta)


@aten("log_sigmoid_forward")
def _log_sigmoid(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Neg", e.op("Softplus", e.op("Neg", e.name(a["self"]))))


@aten("_softmax", "_safe_softmax", "_log_softmax")
def _softmax(e: Emitter, a: Arguments, op: Op) -> str:
    kind = "LogSoftmax" if op.name == "_log_softmax" else "Softmax"
    return e.op(kind, e.name(a["self"]), axis=a["dim"])


# Reductions

_REDUCTIONS = {
    "sum": "ReduceSum",
    "mean": "ReduceMean",
    "amax": "ReduceMax",
    "amin": "ReduceMin",
    "prod": "ReduceProd",
    "logsumexp": "ReduceLogSumExp",
    "any": "ReduceMax",
    "all": "ReduceMin",
    "linalg_vector_norm": "ReduceL2",
}


@aten(*_REDUCTIONS)
def _reduce(e: Emitter, a: Arguments, op: Op) -> str:
    x = a["self"]
    name, flags = e.name(x), op.name in ("any", "all")
    if flags:
        name = e.cast(name, torch.int32)
    elif x.dtype == torch.bool:
        name = e.cast(name, torch.int64)
    if op.name == "linalg_vector_norm" and a["ord"] != 2:
        raise UnsupportedError(f"{op.where}: a norm of order {a['ord']}: only order 2 is exported")
    made = e.op(_REDUCTIONS[op.name], name, *_axes(e, a), keepdims=int(a.get("keepdim") or False))
    return e.cast(made, torch.bool) if flags else made


def _axes(e: Emitter, a: Arguments) -> list[str]:
    axes = a.get("dim")
    if axes is None or axes == []:
        return []
    return [e.const([axes] if isinstance(axes, int) else list(axes))]


@aten("max", "min")
def _extreme(e: Emitter, a: Arguments, op: Op) -> str | list[str]:
    kind, x = op.name.capitalize(), e.name(a["self"])
    if "other" in a:
        return e.op(kind, x, e.name(a["other"]))
    keep = int(a.get("keepdim") or False)
    made = e.op(f"Reduce{kind}", x, *_axes(e, a), keepdims=keep)
    if "dim" not in a:
        return made
    return [made, e.op(f"Arg{kind}", x, axis=a["dim"], keepdims=keep)]


@aten("argmax", "argmin")
def _arg(e: Emitter, a: Arguments, op: Op) -> str:
    kind = "ArgMax" if op.name == "argmax" else "ArgMin"
    return e.op(kind, e.name(a["self"]), axis=a["dim"], keepdims=int(a["keepdim"]))


@aten("var", "std", "var_mean", "std_mean")
def _spread(e: Emitter, a: Arguments, op: Op) -> str | list[str]:
    x, axes = e.name(a["self"]), _axes(e, a)
    keep = int(a.get("keepdim") or False)
    mean = e.op("ReduceMean", x, *axes, keepdims=1)
    apart = e.op("Sub", x, mean)
    made = e.op("ReduceMean", e.op("Mul", apart, apart), *axes, keepdims=keep)
    correction = a.get("correction", a.get("unbiased", 1))
    correction = 1 if correction is None else int(correction)
    if correction:
        dims = a["dim"] or range(len(a["self"].shape))
        sizes = [a["self"].shape[d] for d in ([dims] if isinstance(dims, int) else dims)]
        if any(isinstance(size, Batch) for size in sizes):
            raise UnsupportedError(f"{op.where}: a spread over the batch cannot be exported")
        count = math.prod(int(size) for size in sizes)
        made = e.op("Mul", made, e.const(count / (count - correction), np.float32))
    made = e.op("Sqrt", made) if op.name.startswith("std") else made
    if not op.name.endswith("mean"):
        return made
    return [made, e.op("ReduceMean", x, *axes, keepdims=keep)]


@aten("cumsum")
def _cumsum(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("CumSum", e.name(a["self"]), e.const(a["dim"]))


# Linear layers


@aten("mm", "bmm", "matmul", "mv", "dot")
def _product(e: Emitter, a: Arguments, op: Op) -> str:
    return _matmul(e, a["self"], a.get("mat2", a.get("vec", a.get("other", a.get("tensor")))))


@aten("addmm", "baddbmm", "addmv")
def _added_product(e: Emitter, a: Arguments, op: Op) -> str:
    x = a.get("mat1", a.get("batch1", a.get("mat")))
    made = _matmul(e, x, a.get("mat2", a.get("batch2", a.get("vec"))))
    if a["alpha"] != 1:
        made = e.op("Mul", made, e.const(a["alpha"], np.float32))
    if a["beta"] == 0:
        return made
    added = e.name(a["self"])
    if a["beta"] != 1:
        added = e.op("Mul", added, e.const(a["beta"], np.float32))
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


@aten("max_pool2d_with_indices", "max_pool2d", "avg_pool2d")
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


@aten("upsample_nearest2d", "upsample_nearest1d", "upsample_bilinear2d", "upsample_bicubic2d")
def _upsample(e: Emitter, a: Arguments, op: Op) -> str:
    out = op.outputs[0]
    assert out is not None  # the schema has one output
    sizes = [a["self"].shape[1], *out.shape[2:]]
    scale = [1.0, *(b / s for b, s in zip(sizes, a["self"].shape[1:], strict=True))]
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


@aten("native_batch_norm", "_native_batch_norm_legit_no_training", "_native_batch_norm_legit")
def _batch_norm(e: Emitter, a: Arguments, op: Op) -> str:
    x = a["input"]
    tall = [1, -1, *[1] * (len(x.shape) - 2)]
    if a.get("training"):
        axes = e.const([0, *range(2, len(x.shape))])
        if isinstance(x.shape[0], Batch):
            raise UnsupportedError(
                f"{op.where}: batch normalization in training mode makes samples depend on each "
                "other: call the module's eval(), or set track_running_stats"
            )
        name = e.name(x)  # instance normalization: torch sees one sample of n * c channels
        apart = e.op("Sub", name, e.op("ReduceMean", name, axes, keepdims=1))
        spread = e.op("ReduceMean", e.op("Mul", apart, apart), axes, keepdims=1)
        made = e.op("Div", apart, e.op("Sqrt", e.op("Add", spread, _f32(e, a["eps"]))))
        for kind, key in (("Mul", "weight"), ("Add", "bias")):
            if a[key] is not None:
                made = e.op(kind, made, e.op("Reshape", e.name(a[key]), e.const(tall)))
        return made
    mean, spread = a["running_mean"].tensor, a["running_var"].tensor
    scale: Any = torch.rsqrt(spread.double() + a["eps"])
    scale = scale if a["weight"] is None else scale * a["weight"].tensor.detach()
    shift = -mean * scale
    shift = shift if a["bias"] is None else shift + a["bias"].tensor.detach()
    column: list[Array] = [t.float().reshape(tall[1:]).numpy() for t in (scale, shift)]
    scaled = e.op("Mul", e.name(x), e.const(column[0], np.float32))
    return e.op("Add", scaled, e.const(column[1], np.float32))


def _f32(e: Emitter, value: float) -> str:
    return e.const(value, np.float32)


def _common(op: Op) -> torch.dtype:
    return op.common or torch.float32
