"""AWQ: scales the inputs that matter up in the weights, and down where they come from.

Lin et al., "AWQ: Activation-aware Weight Quantization" (arXiv 2306.00978). W x = (W s)(x / s) for
any s > 0 per input. Rounding W s costs less where s is large, so s grows with the inputs' size,
s = rms(x)**a, with the a that loses least at the layer's output. Dividing x by s costs nothing: it
goes into the gain of the norm before, or into the rows of the linear layer that made x.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from types import ModuleType
from typing import Any, Protocol

import numpy as np
from onnx import NodeProto

from leangen.graph_edit import Graph, attributes
from leangen.methods import imatrix, output_loss
from leangen.schemes import Array, Packed
from leangen.sites import Site

NEEDS_DATA = True
_EXPONENTS = tuple(a / 10 for a in range(11))
_ROWS = 256
"""Rows of a weight that the exponent is judged by."""
# Where a norm's gain, and its bias if any, are among its inputs.
_NORMS: Mapping[str, tuple[int, ...]] = {
    "RMSNormalization": (1,),
    "SimplifiedLayerNormalization": (1,),
    "LayerNormalization": (1, 2),
    "SkipSimplifiedLayerNormalization": (2,),
    "SkipLayerNormalization": (2, 3),
}


class Moments(Protocol):
    """Second moments by tensor, as `leangen.moments.Moments` has them."""

    def __getitem__(self, tensor: str) -> Array: ...

    def divide(self, tensor: str, scale: Array) -> None:
        """Take note that the graph now divides a tensor by `scale` [k]."""


Trial = Callable[[Site, Array, Array], Array]
"""(site, w [rows, k], importance [k]) -> w as rounding would leave it."""


def quantize(w: Array, scheme: ModuleType, moment: Array, **options: Any) -> Packed:
    """Round `w` [n, k], scaled already, by the size of its inputs, scaled already."""
    return imatrix.quantize(w, scheme, moment, **options)


def prepare(graph: Graph, sites: Sequence[Site], moments: Moments, trial: Trial) -> None:
    """Rescale the linear layers of `sites` whose inputs can be divided where they come from.

    The graph computes the same as before, but for float rounding.
    """
    for tensor, consumers, sources in _foldable(graph, sites):
        moment = moments[tensor]
        scale = _best(graph, consumers, moment, trial)
        for site in consumers:
            graph.rescale(site.weight, 0 if site.swapped else 1, scale)
        for name, axis, rows in sources:
            factors = np.ones(graph.shape(name)[axis], np.float32)
            factors[rows] = 1 / scale
            graph.rescale(name, axis, factors)
        moments.divide(tensor, scale)


def _best(graph: Graph, consumers: Sequence[Site], moment: Array, trial: Trial) -> Array:
    """The scale [k] of least loss at the outputs of all consumers together; ones for none."""
    energy = np.diagonal(moment).astype(np.float64)
    size = np.sqrt(np.maximum(energy, energy.max() * 1e-8 + 1e-30))
    samples = []
    for site in consumers:
        w = graph.array(site.weight)
        w = w.T if site.swapped else w
        samples.append(np.ascontiguousarray(w[:: max(1, len(w) // _ROWS)], np.float32))
    best, least = np.ones(len(size), np.float32), np.inf
    for exponent in _EXPONENTS:
        scale = size**exponent
        scale = (scale / np.sqrt(scale.max() * scale.min())).astype(np.float32)
        loss = sum(
            output_loss(trial(site, w * scale, energy / scale**2) / scale - w, moment).sum()
            for site, w in zip(consumers, samples, strict=True)
        )
        if loss < least:
            best, least = scale, loss
    return best


Source = tuple[str, int, slice]
"""A constant to divide, along which axis, and where along it."""


def _foldable(
    graph: Graph, sites: Sequence[Site]
) -> Iterator[tuple[str, list[Site], list[Source]]]:
    """Inputs of linear layers, the layers, and the constants that a division goes into."""
    made_by = {output: node for node in graph.nodes for output in node.output}
    readers: dict[str, list[NodeProto]] = {}
    for node in graph.nodes:
        for name in node.input:
            readers.setdefault(name, []).append(node)
    linear = {site.node.name: site for site in sites if site.kind == "linear"}
    outputs = {output.name for output in graph.model.graph.output}

    def only(name: str, node: NodeProto) -> bool:
        return len(readers.get(name, ())) == 1 and readers[name][0] is node

    for tensor in dict.fromkeys(site.node.input[0] for site in linear.values()):
        producer, consumers = made_by.get(tensor), readers[tensor]
        if producer is None or tensor in outputs:
            continue
        if not all(
            reader.name in linear
            and reader.input[0] == tensor
            and only(linear[reader.name].weight, reader)
            for reader in consumers
        ):
            continue
        sources: list[Source] | None = None
        if producer.op_type in _NORMS:
            names = [producer.input[i] for i in _NORMS[producer.op_type] if i < len(producer.input)]
            names = [name for name in names if name]
            if all(graph.has(name) and only(name, producer) for name in names):
                sources = [(name, 0, slice(None)) for name in names]
        elif producer.op_type == "Mul":
            for factor in producer.input:
                if only(factor, producer) and factor not in outputs:
                    sources = sources or _rows(graph, factor, made_by, linear, only)
        if sources:
            yield tensor, [linear[reader.name] for reader in consumers], sources


def _rows(
    graph: Graph,
    tensor: str,
    made_by: Mapping[str, NodeProto],
    linear: Mapping[str, Site],
    only: Callable[[str, NodeProto], bool],
) -> list[Source] | None:
    """The rows of a linear layer that make `tensor`, directly or through a Split in two."""
    node, rows = made_by.get(tensor), slice(None)
    if node is None:
        return None
    if node.op_type == "Split" and len(node.input) == 1 and len(node.output) == 2:
        whole = made_by.get(node.input[0])
        if attributes(node).get("axis", 0) != -1 or whole is None or whole.name not in linear:
            return None
        half = linear[whole.name].rows // 2
        rows = slice(0, half) if tensor == node.output[0] else slice(half, 2 * half)
        if not only(node.input[0], node):
            return None
        node = whole
    site = linear.get(node.name)
    if site is None or not only(site.weight, node):
        return None
    sources = [(site.weight, 1 if site.swapped else 0, rows)]
    bias = node.input[2] if len(node.input) > 2 else ""
    if bias:
        if not (graph.has(bias) and only(bias, node) and graph.shape(bias) == (site.rows,)):
            return None
        sources.append((bias, 0, rows))
    return sources
