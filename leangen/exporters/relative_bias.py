"""T5's biases of attention by distance, as tables that a graph looks them up in.

All distances from `Relative.most` on share a bucket, so a table of the near ones is enough for
sequences of any length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from onnx import TensorProto

from leangen.exporters.decoder import Relative, Weights
from leangen.exporters.gguf_blocks import Floats
from leangen.exporters.onnx_writer import GraphWriter

Places = np.ndarray[Any, np.dtype[np.int64]]
NAME = "relative_bias"
"""The tensor [1, heads, queries, keys]."""


def buckets(distances: Places, relative: Relative, *, both_ways: bool) -> Places:
    """The bucket of each key's place less its query's (Raffel et al., 1910.10683, section 2.1).

    Near distances have buckets of their own, further ones share them logarithmically; with
    `both_ways` half of the buckets are for keys that follow the query.
    """
    count = relative.buckets // 2 if both_ways else relative.buckets
    base = count * (distances > 0) if both_ways else 0 * distances
    away = np.abs(distances) if both_ways else np.maximum(-distances, 0)
    exact = count // 2
    # float32, as where the tables were learned: a bucket's edge may hang on the last bit
    share = np.log(np.maximum(away, 1).astype(np.float32) / np.float32(exact))
    share /= np.float32(np.log(relative.most / exact))
    far = exact + (share * np.float32(count - exact)).astype(np.int64)
    found: Places = base + np.where(away < exact, away, np.minimum(far, count - 1))
    return found


def causal(writer: GraphWriter, relative: Relative, weights: Weights) -> str:
    """The bias for the new tokens of one sequence, from `input_ids` and `total_sequence_length`."""
    node = writer.node
    zero, one = _scalars(writer)
    total = node("Cast", "/relative/total", ["total_sequence_length"], to=TensorProto.INT64)
    keys = node("Range", "/relative/keys", [zero, total, one])
    new = node(
        "Squeeze", "/relative/new", [node("Shape", "/relative/shape", ["input_ids"], start=1)]
    )
    first = node("Sub", "/relative/first", [total, new])
    queries = node("Range", "/relative/queries", [first, total, one])
    away = np.arange(-relative.most, 1)
    found = buckets(away, relative, both_ways=False)
    return _looked_up(writer, relative, _table(weights, "relative", found), queries, keys)


def bidirectional(writer: GraphWriter, relative: Relative, weights: Weights, length: str) -> str:
    """The bias between all of `length` tokens (the name of a scalar)."""
    zero, one = _scalars(writer)
    places = writer.node("Range", "/relative/places", [zero, length, one])
    away = np.arange(-relative.most, relative.most + 1)
    found = buckets(away, relative, both_ways=True)
    return _looked_up(writer, relative, _table(weights, "encoder.relative", found), places, places)


def _scalars(writer: GraphWriter) -> tuple[str, str]:
    return writer.constant("relative.zero", np.array(0)), writer.constant(
        "relative.one", np.array(1)
    )


def _table(weights: Weights, name: str, found: Places) -> Floats:
    by_bucket = weights.matrix(name)
    assert isinstance(by_bucket, np.ndarray)  # no checkpoint holds it in low-bit blocks
    return np.ascontiguousarray(by_bucket[found].T)


def _looked_up(
    writer: GraphWriter, relative: Relative, table: Floats, queries: str, keys: str
) -> str:
    """The bias by the place of a key less that of its query; `table` [heads, places] begins
    with the key that is `relative.most` places before."""
    node, constant = writer.node, writer.constant
    last = constant("relative.axis", np.array([1]))
    column = node("Unsqueeze", "/relative/column", [queries, last])
    away = node("Sub", "/relative/away", [keys, column])
    most = constant("relative.most", np.array(relative.most))
    place = node("Add", "/relative/place", [away, most])
    end = constant("relative.end", np.array(table.shape[1] - 1))
    place = node("Clip", "/relative/near", [place, "relative.zero", end])
    bias = node("Gather", "/relative/bias", [constant("relative.table", table), place], axis=1)
    first = constant("relative.first", np.array([0]))
    return node("Unsqueeze", "/relative/batched", [bias, first], [NAME])
