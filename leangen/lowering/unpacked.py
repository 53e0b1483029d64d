"""Low-bit weights that a graph unpacks with standard operators, found again as codes and scales.

`treatments.floats` stores a weight as codes in blocks, which Cast, Sub and Mul turn to floats, then
a Reshape to the weight's shape and a Transpose where a row of the matrix is a column of the weight.
ORT folds all that when it loads the graph.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from leangen.graph_edit import Array, attributes
from leangen.lowering.draft import Draft


@dataclass(frozen=True, slots=True)
class Codes:
    """A matrix [n, k] as unsigned codes and scales (and minima) per group of columns."""

    bits: int
    codes: Array
    """uint8 [n, k]; without minima they stand around 2**(bits - 1)."""
    scales: Array
    """float32 [n, groups]"""
    minima: Array | None = None


@dataclass(frozen=True, slots=True)
class Weight:
    """An unpacked weight of any rank: its rows are outputs."""

    rows: Codes
    shape: tuple[int, ...]
    """Of the rows as a tensor, before `order`."""
    order: tuple[int, ...] | None
    """The transposition that makes the weight of it, or None."""


def matrix(graph: Draft, tensor: str) -> Codes | None:
    """The rows [n, k] of a matrix that a MatMul takes as [k, n]; None for anything else."""
    found = weight(graph, tensor)
    if found is None or len(found.shape) != 2 or found.order != (1, 0):
        return None
    return found.rows


def weight(graph: Draft, tensor: str) -> Weight | None:
    """The weight that a tensor is unpacked from, or None."""
    order = None
    node = graph.producer(tensor, "Reshape", "Transpose")
    if node is not None and node.op_type == "Transpose":
        order = tuple(attributes(node)["perm"])
        node = graph.producer(node.input[0], "Reshape")
    if node is None:
        return None
    shape, scaled = graph.values(node.input[1]), graph.producer(node.input[0], "Mul")
    if shape is None or scaled is None:
        return None
    scales = widened(graph, scaled.input[1])
    codes = _codes8(graph, scaled.input[0]) or _codes4(graph, scaled.input[0])
    if scales is None or scales.ndim != 3 or codes is None:
        return None
    bits, blocks = codes
    rows = Codes(bits, blocks.reshape(blocks.shape[0], -1), scales[..., 0].astype(np.float32))
    return Weight(rows, tuple(shape), order)


def widened(graph: Draft, tensor: str) -> Array | None:
    """A constant, or one that is cast; None for anything else."""
    node = graph.producer(tensor, "Cast")
    name = tensor if node is None else node.input[0]
    return graph.array(name) if graph.has(name) else None


def _codes8(graph: Draft, tensor: str) -> tuple[int, Array] | None:
    """Cast(int8 blocks)"""
    q = widened(graph, tensor)
    if q is None or q.dtype != np.int8:
        return None
    return 8, q.view(np.uint8) ^ np.uint8(128)


def _codes4(graph: Draft, tensor: str) -> tuple[int, Array] | None:
    """Cast(Concat(Mod(q, 16), BitShift(q, 4))) - 8"""
    centred = graph.producer(tensor, "Sub")
    if centred is None or graph.values(centred.input[1]) != [8.0]:
        return None
    cast = graph.producer(centred.input[0], "Cast")
    joined = None if cast is None else graph.producer(cast.input[0], "Concat")
    if joined is None or len(joined.input) != 2 or attributes(joined)["axis"] != -1:
        return None
    low = graph.producer(joined.input[0], "Mod")
    high = graph.producer(joined.input[1], "BitShift")
    if (
        low is None
        or high is None
        or low.input[0] != high.input[0]
        or graph.values(low.input[1]) != [16]
        or graph.values(high.input[1]) != [4]
        or attributes(high)["direction"] != b"RIGHT"
        or not graph.has(low.input[0])
    ):
        return None
    q = graph.array(low.input[0])
    return 4, np.concatenate([q & np.uint8(15), q >> np.uint8(4)], axis=2)
