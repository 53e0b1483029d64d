"""ATen's views, cuts, indexing and type changes in ONNX."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from leangen.errors import UnsupportedError
from leangen.exporters.torch_emitter import Emitter, registry
from leangen.exporters.torch_trace import Batch, Constant, Op, Size, Tensor, Value

Arguments = Mapping[str, Any]
CONVERSIONS, aten = registry()
_TO_THE_END = 2**63 - 1


@aten("clone", "detach", "alias")
def _same(e: Emitter, a: Arguments, op: Op) -> str:
    return e.name(a["self"])


@aten("view", "_unsafe_view", "unsqueeze", "squeeze")
def _view(e: Emitter, a: Arguments, op: Op) -> str:
    return e.reshape(e.name(a["self"]), _made(op).shape)


@aten("expand")
def _expand(e: Emitter, a: Arguments, op: Op) -> str:
    shape = list(_made(op).shape)
    old = [1] * (len(shape) - len(a["self"].shape)) + list(a["self"].shape)
    # ONNX keeps a size where 1 is asked for: only what grows has to be told.
    asked: list[Size] = [1 if now == size else size for now, size in zip(old, shape, strict=True)]
    if all(size == 1 for size in asked) and len(shape) == len(a["self"].shape):
        return e.name(a["self"])
    return e.op("Expand", e.name(a["self"]), e.shape(asked))


@aten("copy", "fill")
def _copy(e: Emitter, a: Arguments, op: Op) -> str:
    """Mutation taken out: what was written over a whole tensor."""
    made = _made(op)
    new = e.name(a.get("src", a.get("value")), made.dtype)
    return e.op("Expand", new, e.shape(made.shape))


@aten("_to_copy")
def _to(e: Emitter, a: Arguments, op: Op) -> str:
    return e.name(a["self"], _made(op).dtype)


@aten("permute")
def _permute(e: Emitter, a: Arguments, op: Op) -> str:
    rank = len(a["self"].shape)
    return e.op("Transpose", e.name(a["self"]), perm=[d % rank for d in a["dims"]])


@aten("transpose", "t")
def _transpose(e: Emitter, a: Arguments, op: Op) -> str:
    rank = len(a["self"].shape)
    order = list(range(rank))
    one, two = (a["dim0"] % rank, a["dim1"] % rank) if "dim0" in a else (0, rank - 1)
    order[one], order[two] = order[two], order[one]
    return e.op("Transpose", e.name(a["self"]), perm=order)


@aten("cat")
def _cat(e: Emitter, a: Arguments, op: Op) -> str:
    dtype = _made(op).dtype
    parts = [part for part in a["tensors"] if part.shape != (0,)]
    names = [e.full(part) if part.dtype == dtype else e.name(part, dtype) for part in parts]
    return e.op("Concat", *names, axis=a["dim"])


@aten("stack")
def _stack(e: Emitter, a: Arguments, op: Op) -> str:
    rank = len(_made(op).shape)
    axis = e.const([a["dim"] % rank])
    names = [e.op("Unsqueeze", e.full(part), axis) for part in a["tensors"]]
    return e.op("Concat", *names, axis=a["dim"] % rank)


@aten("split", "split_with_sizes", "unbind")
def _split(e: Emitter, a: Arguments, op: Op) -> list[str]:
    axis, x = a["dim"], e.name(a["self"])
    if op.name == "unbind":
        return [
            e.op("Gather", x, e.const(place), axis=axis)
            for place in range(int(a["self"].shape[axis]))
        ]
    sizes = [output.shape[axis] for output in op.outputs if output is not None]
    if len(sizes) == 1:
        return [x]
    return e.several("Split", len(sizes), x, e.shape(sizes), axis=axis)


@aten("select")
def _select(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Gather", e.name(a["self"]), e.const(a["index"]), axis=a["dim"])


@aten("slice")
def _slice(e: Emitter, a: Arguments, op: Op) -> str:
    return _cut(e, e.name(a["self"]), a["dim"], a["start"] or 0, a["end"], a["step"])


def _cut(e: Emitter, x: str, axis: int, start: Size, end: Size | None, step: int = 1) -> str:
    end = _TO_THE_END if end is None else end
    if start == 0 and end == _TO_THE_END and step == 1:
        return x
    return e.op("Slice", x, *(e.shape([value]) for value in (start, end, axis, step)))


@aten("select_scatter", "slice_scatter")
def _scatter_part(e: Emitter, a: Arguments, op: Op) -> str:
    """A tensor with some of its rows, columns ... along one axis replaced."""
    base, source, axis = a["self"], a["src"], a["dim"] % len(a["self"].shape)
    size = base.shape[axis]
    if isinstance(size, Batch):
        raise UnsupportedError(f"{op.where}: some samples of a batch are overwritten: not exported")
    if op.name == "select_scatter":
        places = [a["index"] % size]
        filled = list(base.shape)
        filled[axis] = 1
        new = e.op("Unsqueeze", e.full(source, base.dtype), e.const([axis]))
        new = e.op("Expand", new, e.shape(filled))
    else:
        places = list(range(size))[a["start"] : a["end"] : a["step"]]
        new = e.full(source, base.dtype)
    return _overwritten(e, base, new, places, axis)


@aten("index_put")
def _index_put(e: Emitter, a: Arguments, op: Op) -> str:
    base, source = a["self"], a["values"]
    axis, index = _one_index(a["indices"], op)
    if isinstance(index, Value) or index.tensor.dim() != 1 or a["accumulate"]:
        raise UnsupportedError(
            f"{op.where}: values are written to computed places: use torch.where or torch.cat"
        )
    filled = list(base.shape)
    filled[axis] = len(index.tensor)
    new = e.full(source, base.dtype)
    if tuple(source.shape) != tuple(filled):
        new = e.op("Expand", new, e.shape(filled))
    return _overwritten(e, base, new, index.tensor.tolist(), axis)


def _overwritten(e: Emitter, base: Tensor, new: str, places: Sequence[int], axis: int) -> str:
    """`base` with `new` at these places of an axis: both side by side, then reordered."""
    size = base.shape[axis]
    assert isinstance(size, int)  # checked by the callers
    rank = {place % size: k for k, place in enumerate(places)}
    kept = [place for place in range(size) if place not in rank]
    if not kept:
        order = [rank[place] for place in range(size)]
        joined = new
    else:
        old = {place: len(rank) + k for k, place in enumerate(kept)}
        order = [rank[place] if place in rank else old[place] for place in range(size)]
        joined = e.op("Concat", new, _taken(e, e.full(base), kept, axis), axis=axis)
    return joined if order == list(range(size)) else _taken(e, joined, order, axis)


def _taken(e: Emitter, x: str, places: Sequence[int], axis: int) -> str:
    if places and list(places) == list(range(places[0], places[0] + len(places))):
        return _cut(e, x, axis, places[0], places[0] + len(places))
    return e.op("Gather", x, e.const(list(places)), axis=axis)


@aten("index", "index_select")
def _index(e: Emitter, a: Arguments, op: Op) -> str:
    if op.name == "index_select":
        axis, index = a["dim"], a["index"]
    else:
        axis, index = _one_index(a["indices"], op)
    if isinstance(index, Constant) and index.tensor.dtype != torch.bool:
        size = a["self"].shape[axis]
        if isinstance(size, int) and index.tensor.dim() == 1:
            return _taken(e, e.name(a["self"]), (index.tensor % size).tolist(), axis)
    return e.op("Gather", e.name(a["self"]), e.name(index, torch.int64), axis=axis)


def _one_index(indices: Sequence[Any], op: Op) -> tuple[int, Tensor]:
    """The axis and the places of an indexing by one tensor; a mask becomes places."""
    given = [(axis, index) for axis, index in enumerate(indices) if index is not None]
    if len(given) != 1:
        raise UnsupportedError(
            f"{op.where}: indexing by {len(given)} tensors at once: use torch.gather"
        )
    axis, index = given[0]
    if isinstance(index, Constant) and index.dtype == torch.bool:
        if index.tensor.dim() != 1:
            raise UnsupportedError(
                f"{op.where}: a mask over {index.tensor.dim()} axes: use places along one axis"
            )
        index = Constant(index.tensor.nonzero()[:, 0])
    return axis, index


@aten("gather")
def _gather(e: Emitter, a: Arguments, op: Op) -> str:
    x, index = a["self"], a["index"]
    return e.op("GatherElements", e.full(x), e.full(index), axis=a["dim"])


@aten("scatter")
def _scatter(e: Emitter, a: Arguments, op: Op) -> str:
    base, index = a["self"], e.full(a["index"])
    if "src" in a:
        new = e.name(a["src"], base.dtype)
    else:
        value = e.name(a["value"], base.dtype)
        new = e.op("Expand", value, e.op("Shape", index))
    return e.op("ScatterElements", e.full(base), index, new, axis=a["dim"])


@aten("searchsorted", "bucketize")
def _searchsorted(e: Emitter, a: Arguments, op: Op) -> str:
    """How many of the sorted numbers lie below each value."""
    edges = a.get("sorted_sequence", a.get("boundaries"))
    values, last = e.op("Unsqueeze", e.name(a["self"]), e.const([-1])), e.const([-1])
    if len(edges.shape) > 1:
        edges_name = e.op("Unsqueeze", e.name(edges), e.const([-2]))
    else:
        edges_name = e.name(edges)
    right = a.get("right") or a.get("side") == "right"
    below = e.op("LessOrEqual" if right else "Less", edges_name, values)
    return e.op("ReduceSum", e.cast(below, torch.int64), last, keepdims=0)


@aten("constant_pad_nd")
def _pad(e: Emitter, a: Arguments, op: Op) -> str:
    value = e.name(float(a["value"]), a["self"].dtype)
    return e.op("Pad", e.name(a["self"]), _pads(e, a), value, mode="constant")


@aten("reflection_pad2d", "replication_pad2d")
def _pad_like(e: Emitter, a: Arguments, op: Op) -> str:
    mode = "reflect" if op.name.startswith("reflection") else "edge"
    return e.op("Pad", e.name(a["self"]), _pads(e, a), mode=mode)


def _pads(e: Emitter, a: Arguments) -> str:
    """torch pads the last axis first, as (before, after) each; ONNX has all the befores first."""
    pad, rank = list(a.get("pad") or a["padding"]), len(a["self"].shape)
    before, after = [0] * rank, [0] * rank
    for k in range(len(pad) // 2):
        before[rank - 1 - k], after[rank - 1 - k] = pad[2 * k], pad[2 * k + 1]
    return e.const([*before, *after])


@aten("flip")
def _flip(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    for axis in a["dims"]:
        x = e.op("Gather", x, e.const(np.arange(_within(a["self"], axis, op))[::-1]), axis=axis)
    return x


@aten("roll")
def _roll(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    for shift, axis in zip(a["shifts"], a["dims"] or [0], strict=True):
        places = np.roll(np.arange(_within(a["self"], axis, op)), shift)
        x = e.op("Gather", x, e.const(places), axis=axis)
    return x


def _within(x: Tensor, axis: int, op: Op) -> int:
    """The size of an axis of each sample; UnsupportedError for that of the batch."""
    size = x.shape[axis]
    if isinstance(size, Batch):
        raise UnsupportedError(f"{op.where}: the samples of a batch change places: not exported")
    return size


@aten("repeat")
def _repeat(e: Emitter, a: Arguments, op: Op) -> str:
    return e.op("Tile", _view_of_rank(e, a["self"], len(a["repeats"])), e.shape(a["repeats"]))


def _view_of_rank(e: Emitter, x: Tensor, rank: int) -> str:
    missing = rank - len(x.shape)
    return e.reshape(e.name(x), [1] * missing + list(x.shape)) if missing else e.name(x)


@aten("pixel_shuffle", "pixel_unshuffle")
def _pixel_shuffle(e: Emitter, a: Arguments, op: Op) -> str:
    x = e.name(a["self"])
    if op.name == "pixel_shuffle":
        return e.op("DepthToSpace", x, blocksize=a["upscale_factor"], mode="CRD")
    n, c, h, w = a["self"].shape
    k = a["downscale_factor"]
    x = e.op("Reshape", x, e.const([-1, c, h // k, k, w // k, k]))
    x = e.op("Transpose", x, perm=[0, 1, 3, 5, 2, 4])
    return e.op("Reshape", x, e.const([-1, c * k * k, h // k, w // k]))


@aten("tril", "triu")
def _triangle(e: Emitter, a: Arguments, op: Op) -> str:
    name, diagonal = e.name(a["self"]), e.const(a["diagonal"])
    return e.op("Trilu", name, diagonal, upper=int(op.name == "triu"))


def _made(op: Op) -> Value:
    made = op.outputs[0]
    assert made is not None  # the operators of this module make a tensor
    return made
