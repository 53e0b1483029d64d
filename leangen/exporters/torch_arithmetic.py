"""ATen's arithmetic in ONNX: element by element, activations, reductions."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch

from leangen.errors import UnsupportedError
from leangen.exporters.torch_emitter import Emitter, registry
from leangen.exporters.torch_trace import Batch, Constant, Op, Value

Arguments = Mapping[str, Any]
CONVERSIONS, aten = registry()

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
    "bitwise_xor": "Xor",
}
_LOGICAL = frozenset({"And", "Or", "Xor"})


@aten(*_UNARY)
def _unary(e: Emitter, a: Arguments, op: Op) -> str:
    kind = _UNARY[op.name]
    if op.name == "bitwise_not" and a["self"].dtype != torch.bool:
        kind = "BitwiseNot"
    return e.op(kind, e.name(a["self"], torch.bool if kind == "Not" else None))


@aten(*_BINARY)
def _binary(e: Emitter, a: Arguments, op: Op) -> str:
    kind = _BINARY[op.name]
    dtype = torch.bool if kind in _LOGICAL else _common(op)
    if op.name.startswith("bitwise") and _common(op) != torch.bool:
        kind, dtype = f"Bitwise{kind}", _common(op)
    if kind == "Div":
        dtype = op.outputs[0].dtype if op.outputs[0] is not None else dtype
    elif kind == "Mul" and dtype == torch.bool:
        kind = "And"
    x, y = e.name(a["self"], dtype), e.name(a["other"], dtype)
    if kind == "Div" and a.get("rounding_mode"):
        return _whole_quotient(e, x, y, dtype, a["rounding_mode"])
    return e.op(kind, x, y)


@aten("floor_divide")
def _floor_divide(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _common(op)
    return _whole_quotient(e, e.name(a["self"], dtype), e.name(a["other"], dtype), dtype, "floor")


def _whole_quotient(e: Emitter, x: str, y: str, dtype: torch.dtype, rounding: str) -> str:
    if not dtype.is_floating_point:  # whose Div cuts what is behind the point off
        return e.op("Div", e.op("Sub", x, e.op("Mod", x, y)) if rounding == "floor" else x, y)
    made = e.op("Div", x, y)
    if rounding == "floor":
        return e.op("Floor", made)
    return e.op("Mul", e.op("Sign", made), e.op("Floor", e.op("Abs", made)))


@aten("add", "sub", "rsub")
def _add(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _common(op)
    x, y = e.name(a["self"], dtype), e.name(a["other"], dtype)
    if dtype == torch.bool:
        return e.op("Or", x, y)
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
        made = e.op("Mul", made, e.name(a["value"], a["self"].dtype))
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


@aten("sigmoid")
def _sigmoid(e: Emitter, a: Arguments, op: Op) -> str:
    """As 1 / (1 + exp(-x)): ORT's own stops falling at -18, and flows divide by it."""
    decay = e.op("Exp", e.op("Neg", e.name(a["self"])))
    return e.op("Reciprocal", e.op("Add", decay, e.name(1.0, a["self"].dtype)))


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


_LINEAR_FROM = 17
"""From here on softplus is its argument, in float32."""


@aten("softplus")
def _softplus(e: Emitter, a: Arguments, op: Op) -> str:
    x, dtype = e.name(a["self"]), a["self"].dtype
    if a["beta"] == 1 and a["threshold"] >= _LINEAR_FROM:
        return e.op("Softplus", x)
    beta = e.name(a["beta"], dtype)
    scaled = e.op("Mul", x, beta)
    made = e.op("Div", e.op("Softplus", scaled), beta)
    if a["threshold"] >= _LINEAR_FROM:
        return made
    return e.op("Where", e.op("Greater", scaled, e.name(a["threshold"], dtype)), x, made)


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
    name = e.cast(name, torch.int32) if flags else e.name(x, _dtype(op))
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


@aten("var", "std", "var_mean")
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
    return e.op("CumSum", e.name(a["self"], _dtype(op)), e.const(a["dim"]))


def _dtype(op: Op) -> torch.dtype:
    """Of the result."""
    made = op.outputs[0]
    assert made is not None  # the schemas that ask have one output
    return made.dtype


def _common(op: Op) -> torch.dtype:
    return op.common or torch.float32
