"""Finds the nodes of a graph whose weights can be quantized."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from onnx import NodeProto

from leangen.graph_edit import Graph, attributes

Kind = Literal["conv", "deconv", "linear", "embedding", "matrix"]
"""`matrix`: outputs of a weight [k, n] are picked, to multiply with them later."""

_MIN_WEIGHTS = 1024
"""Smaller weights stay as they are: nothing to save."""


@dataclass(frozen=True, slots=True)
class Site:
    """A node whose weight can be quantized."""

    node: NodeProto
    weight: str
    kind: Kind
    rows: int
    """Outputs: rows of the weight matrix."""
    columns: int
    """Weights per output."""
    swapped: bool
    """The stored weight has its inputs first: [k, n], or [in, out, ...] of ConvTranspose."""

    @property
    def place(self) -> int:
        """Which input of the node is the weight."""
        return list(self.node.input).index(self.weight)

    @property
    def weights(self) -> int:
        """How many weights it has."""
        return self.rows * self.columns


def find_sites(graph: Graph) -> list[Site]:
    """The nodes with float weights that some treatment fits, in graph order."""
    sites = []
    for node in graph.nodes:
        found = _classify(graph, node)
        if found is None:
            continue
        weight, kind, swapped = found
        if not graph.has(weight) or not graph.is_float(weight):
            continue
        shape = graph.shape(weight)
        if len(shape) < 2 or (kind in ("linear", "embedding", "matrix") and len(shape) != 2):
            continue
        size = int(np.prod(shape, dtype=np.int64))
        rows = shape[1] if swapped else shape[0]
        if size >= _MIN_WEIGHTS:
            sites.append(Site(node, weight, kind, rows, size // rows, swapped))
    return sites


def _classify(graph: Graph, node: NodeProto) -> tuple[str, Kind, bool] | None:
    """(weight, kind, swapped) of a node, before its weight is looked at."""
    options = attributes(node)
    match node.op_type:
        case "Conv":
            return node.input[1], "conv", False
        case "ConvTranspose":
            return node.input[1], "deconv", True
        case "MatMul":
            return node.input[1], "linear", True
        case "Gemm" if options.get("alpha", 1) == options.get("beta", 1) == 1 and not options.get(
            "transA"
        ):
            bias = node.input[2] if len(node.input) > 2 else ""
            if not bias or (graph.has(bias) and len(graph.shape(bias)) == 1):
                return node.input[1], "linear", not options.get("transB", 0)
        case "FusedMatMul" if options.get("alpha", 1) == 1 and not any(
            options.get(name) for name in ("transA", "transBatchA", "transBatchB")
        ):
            return node.input[1], "linear", not options.get("transB", 0)
        case "Gather" if options.get("axis", 0) == 0:
            return node.input[0], "embedding", False
        case "Gather" if options["axis"] == 1:
            return node.input[0], "matrix", True
    return None
