"""Rotates a language model's residual stream, folded into its weights: the graph stays as it is.

Ashkboos et al., "QuaRot" (arXiv 2404.00456), and Liu et al., "SpinQuant" (arXiv 2405.16406), of
which these are R1 and R2. RMS norms do not change the length of what they norm, so for any rotation
R norm(x R) = norm(x) R: with the norms' gains folded into the layers after them, whatever writes to
the residual stream may write it rotated (W R), and whatever reads it rotates back (R^T W). Values
are rotated within each head, between the layer that makes them and the output projection. Outliers
are spread over all columns by that, so that a block's scale fits more of its weights.

R = D (Q x H): random signs, and the Kronecker product of a Hadamard matrix and, for the odd part of
the width, a random orthogonal one. A head that shares its weights with the embedding has no gain of
its own: one matrix [width, width] before it holds that.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
from onnx import NodeProto, helper

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import BundleError, UnknownSchemeError
from leangen.families import language
from leangen.graph_edit import Array, Graph, attributes
from leangen.low_bit_bundle import copy_assets
from leangen.plan import HEAD
from leangen.session import Session
from leangen.sites import Site, find_sites

TOLERANCE = 1e-4
"""Of the largest logit, by which float rounding may move one."""
TOKENS = 48
_SEED = 0
_LARGEST = 64
"""Hadamard matrices are multiplied by as Kronecker products of ones of at most this size."""
_NORMS = {"RMSNormalization": 1, "SimplifiedLayerNormalization": 1}
_SKIP = "SkipSimplifiedLayerNormalization"
_SHAPES = ("Reshape", "Slice", "Squeeze", "Unsqueeze")
"""What leaves the columns as they are."""


class Rotation:
    """An orthogonal matrix of some width that is applied fast."""

    def __init__(self, width: int, seed: int = _SEED) -> None:
        self.width = width
        whole = width & -width  # the largest power of two in it
        rng = np.random.default_rng((seed, width))
        self._signs = rng.choice(np.array([-1, 1], np.float32), width)
        q, r = np.linalg.qr(rng.standard_normal((width // whole,) * 2))
        self._factors: list[Array] = [(q * np.sign(np.diagonal(r))).astype(np.float32)]
        while whole > 1:
            size = min(whole, _LARGEST)
            self._factors.append(_hadamard(size))
            whole //= size

    def __call__(self, array: Array, axis: int) -> Array:
        """Rotate every stretch of `width` along an axis: x R for rows x."""
        rows = np.moveaxis(np.asarray(array, np.float32), axis, -1)
        x = rows.reshape(-1, self.width) * self._signs
        inner = self.width
        for factor in self._factors:
            size = len(factor)
            inner //= size
            if inner == 1:
                x = x.reshape(-1, size) @ factor
            elif size > 1:
                x = factor.T @ x.reshape(-1, size, inner)
        return np.ascontiguousarray(np.moveaxis(x.reshape(rows.shape), -1, axis))


def _hadamard(size: int) -> Array:
    """The orthogonal Hadamard matrix of a power of two, by Sylvester's construction."""
    matrix = np.ones((1, 1), np.float32)
    while len(matrix) < size:
        matrix = np.block([[matrix, matrix], [matrix, -matrix]])
    return matrix / np.float32(size**0.5)


@contextmanager
def rotated(bundle: Bundle, beside: Path) -> Iterator[Bundle]:
    """An fp32 bundle that computes what `bundle` does, rotated, while the context lasts.

    It lies beside the folder `beside`. Raises UnknownSchemeError for a model that cannot be
    rotated, with the reason.
    """
    if bundle.family != "language" or set(bundle.graphs) != {"model"} or "io" in bundle.config:
        raise UnknownSchemeError(
            f"{bundle.name} ({bundle.family}) cannot be rotated: that is for language models that "
            "leangen exported; leave out -rot"
        )
    folder = beside.parent / f".{beside.name}.tmp-rotated"
    try:
        with create(folder, replace=True) as draft:
            graph = Graph(bundle.graph("model"))
            try:
                _Stream(graph).rotate()
            except ValueError as error:
                raise UnknownSchemeError(
                    f"{bundle.name} cannot be rotated: {error}; leave out -rot"
                ) from None
            graph.save(draft.folder / bundle.graphs["model"])
            copy_assets(bundle, draft.folder)
            draft.name, draft.family, draft.scheme = bundle.name, bundle.family, bundle.scheme
            draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
            draft.source = dict(bundle.source)
        turned = open_bundle(folder)
        _check(bundle, turned)
        yield turned
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _check(bundle: Bundle, turned: Bundle) -> None:
    """BundleError unless both give the same logits."""
    vocabulary, count = bundle.config["vocab_size"], min(TOKENS, bundle.config["context_length"])
    tokens = np.random.default_rng(0).integers(0, vocabulary, count).tolist()
    before, after = (
        language.logits(Session(each, kernels="ort"), tokens) for each in (bundle, turned)
    )
    if not np.isfinite(before).all():
        raise BundleError(
            f"{bundle.name} gives a logit that is NaN or infinite: export the model again from an "
            "intact source"
        )
    moved = float(np.abs(after - before).max() / np.abs(before).max())
    if not moved < TOLERANCE:
        raise BundleError(
            f"rotating {bundle.name} moved its logits by {moved:.1e} of the largest, expected less "
            f"than {TOLERANCE:.0e}: its graph is not what it seems; leave out -rot"
        )


class _Stream:
    """The residual stream of a graph, found from the embedding on, and what reads and writes it.

    ValueError says what stands in the way.
    """

    def __init__(self, graph: Graph) -> None:
        self._graph = graph
        self._made_by = {output: node for node in graph.nodes for output in node.output}
        self._sites = {site.node.name: site for site in find_sites(graph)}
        self._linear = {n: site for n, site in self._sites.items() if site.kind == "linear"}
        self._outputs = {output.name for output in graph.model.graph.output}
        tables = [site for site in self._sites.values() if site.kind == "embedding"]
        if len(tables) != 1:
            raise ValueError(f"it looks up {len(tables)} tables, expected its embedding alone")
        self._table = tables[0]
        self._width = self._table.columns
        self._turns: list[Callable[[], None]] = []
        self._seen: set[str] = set()

    def rotate(self) -> None:
        """Change the graph's constants in place, all or none."""
        turn = Rotation(self._width)
        stream = {self._table.node.output[0]}
        normed: dict[str, str] = {}  # tensor -> the gain that is to be folded
        inner = set[str]()
        for node in self._graph.nodes:
            read = [name for name in node.input if name in stream]
            if read:
                self._reads_stream(node, read, stream, normed, turn)
            elif any(name in normed for name in node.input):
                self._reads_norm(node, stream, normed, turn)
            if node.op_type == "GroupQueryAttention":
                inner.add(node.name)
                self._turn_values(node)
        if self._outputs & (stream | normed.keys()):
            raise ValueError("the residual stream is an output of its graph")
        if not inner:
            raise ValueError("it has no attention that leangen's exporters write")
        self._change(self._table.weight, lambda w: turn(w, 1))
        for apply in self._turns:
            apply()

    def _later(self, name: str, change: Callable[[Array], Array]) -> None:
        self._turns.append(partial(self._graph.change, name, change))

    def _change(self, name: str, change: Callable[[Array], Array]) -> None:
        self._once(name)
        self._later(name, change)

    def _once(self, name: str) -> None:
        if name in self._seen:
            raise ValueError(f"{name!r} is read in two places")
        self._seen.add(name)

    def _reads_stream(
        self,
        node: NodeProto,
        read: list[str],
        stream: set[str],
        normed: dict[str, str],
        turn: Rotation,
    ) -> None:
        """Norms and sums; what is added is written by a linear layer, rotated from now on."""
        others = [name for name in node.input if name and name not in stream]
        if node.op_type in _NORMS and node.input[0] in stream:
            normed[node.output[0]] = self._gain(node.input[1])
        elif node.op_type == _SKIP and len(read) == 1 and node.input[2] not in stream:
            self._written(next(n for n in node.input[:2] if n not in stream), turn)
            if len(node.input) > 3 and node.input[3]:
                self._change(node.input[3], lambda bias: turn(bias, 0))
            normed[node.output[0]] = self._gain(node.input[2])
            stream.update(name for name in node.output[3:] if name)
        elif node.op_type == "Add" and len(read) == 1 and len(others) == 1:
            self._written(others[0], turn)
            stream.add(node.output[0])
        elif (node.op_type in _SHAPES and node.input[0] in stream) or (
            node.op_type in ("Mul", "Div") and len(others) == 1 and self._is_number(others[0])
        ):
            stream.add(node.output[0])
        else:
            raise ValueError(f"{node.name!r} ({node.op_type}) reads its residual stream")

    def _reads_norm(
        self, node: NodeProto, stream: set[str], normed: dict[str, str], turn: Rotation
    ) -> None:
        x = node.input[0]
        if node.op_type in _SHAPES and x in normed:
            normed[node.output[0]] = normed[x]
            return
        site = self._linear.get(node.name)
        if site is None or x not in normed:
            raise ValueError(f"{node.name!r} ({node.op_type}) reads a norm")
        gain = np.asarray(self._graph.array(normed[x]), np.float32)
        axis = 0 if site.swapped else 1
        if site.weight == self._table.weight:
            self._turns.append(partial(self._before_head, node, gain, turn))
            return
        along = gain[:, None] if site.swapped else gain
        self._change(site.weight, lambda w: turn(w * along, axis))

    def _before_head(self, head: NodeProto, gain: Array, turn: Rotation) -> None:
        """Put what the last norm's gain has become before a head with the embedding's weights."""
        name = f"{HEAD}/gain"
        matrix = turn(turn(np.diag(gain), 0), 1)
        weight = self._graph.add(f"{name}.weight", matrix)
        gained = helper.make_node("MatMul", [head.input[0], weight], [f"{name}/y"], name)
        after = NodeProto()
        after.CopyFrom(head)
        after.input[0] = gained.output[0]
        self._graph.replace({head.name: [gained, after]})

    def _gain(self, name: str) -> str:
        """The gain of a norm, which becomes ones."""
        if not self._graph.has(name) or self._graph.shape(name) != (self._width,):
            raise ValueError(f"a norm's gain {name!r} is not of the residual stream's width")
        if name not in self._seen:
            self._change(name, np.ones_like)
        return name

    def _written(self, tensor: str, turn: Rotation) -> None:
        """Rotate what writes a tensor: a linear layer, perhaps with a bias after it."""
        node = self._made_by.get(tensor)
        while node is not None and node.op_type in _SHAPES:
            node = self._made_by.get(node.input[0])
        if node is not None and node.op_type == "Add":
            biases = [name for name in node.input if self._graph.has(name)]
            if len(biases) == 1 and self._graph.shape(biases[0]) == (self._width,):
                self._change(biases[0], lambda bias: turn(bias, 0))
                node = self._made_by.get(next(n for n in node.input if n != biases[0]))
        site = None if node is None else self._linear.get(node.name)
        if node is None or site is None:
            told = "an input" if node is None else f"{node.name!r} ({node.op_type})"
            raise ValueError(f"{told} writes its residual stream, where a linear layer is expected")
        if site.rows != self._width:
            raise ValueError(f"{node.name!r} writes {site.rows} columns to it, not {self._width}")
        if len(node.input) > 2 and node.input[2]:
            self._change(node.input[2], lambda bias: turn(bias, 0))
        self._change(site.weight, lambda w: turn(w, 1 if site.swapped else 0))

    def _turn_values(self, attention: NodeProto) -> None:
        """Rotate the values of each head, and back in the output projection, where both are plain.

        Left out where something stands between: nothing else depends on it.
        """
        heads, groups = (attributes(attention)[n] for n in ("num_heads", "kv_num_heads"))
        source = attention.input[2] if attention.input[2] else attention.input[0]
        node = self._made_by.get(source)
        while node is not None and node.op_type in (*_SHAPES, "Split"):
            node = self._made_by.get(node.input[0])
        makes, takes = self._linear_of(node), self._only_reader(attention.output[0])
        if makes is None or takes is None or takes.columns % heads:
            return
        width = takes.columns // heads
        if makes.rows != (heads + 2 * groups) * width:
            return
        turn, values = Rotation(width), slice(makes.rows - groups * width, None)

        def make(w: Array) -> Array:
            changed = np.array(w, np.float32)
            place = (slice(None), values) if makes.swapped else (values, slice(None))
            changed[place] = turn(changed[place], 1 if makes.swapped else 0)
            return changed

        self._later(makes.weight, make)
        self._later(takes.weight, lambda w: turn(w, 0 if takes.swapped else 1))

    def _linear_of(self, node: NodeProto | None) -> Site | None:
        """The linear layer without a bias that a node is."""
        site = None if node is None else self._linear.get(node.name)
        return None if site is None or len(site.node.input) > 2 else site

    def _only_reader(self, tensor: str) -> Site | None:
        """The linear layer that alone reads a tensor, reshaped or not."""
        while True:
            readers = [node for node in self._graph.nodes if tensor in node.input]
            if len(readers) != 1:
                return None
            if readers[0].op_type not in _SHAPES:
                return self._linear.get(readers[0].name)
            tensor = readers[0].output[0]

    def _is_number(self, name: str) -> bool:
        return self._graph.has(name) and int(np.prod(self._graph.shape(name))) == 1
