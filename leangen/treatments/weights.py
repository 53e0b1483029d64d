"""A graph's weights in low-bit form: packed once each, and kept as constants of the graph."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from types import ModuleType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto

from leangen import schemes
from leangen.graph_edit import Array, Graph
from leangen.schemes import Packed
from leangen.sites import Site
from leangen.treatments.forms import TABLES, Form
from leangen.treatments.unpacking import node

BLOCK = 32
"""Weights per scale where nothing else is asked; MatMulNBits rounds activations in its blocks."""

MASKED_SHARE = 0.01
"""A weight with more zeros than this has a mask."""

Rounding = Callable[[Site, Array, ModuleType, Mapping[str, Any]], Packed]
"""Makes codes of a site's matrix: (site, w [n, k], scheme, its options) -> Packed."""


def round_to_nearest(
    site: Site, w: Array, scheme: ModuleType, options: Mapping[str, Any]
) -> Packed:
    """The rounding that needs no data: each scheme's own."""
    packed: Packed = scheme.quantize(w, **options)
    return packed


class Weights:
    """Packs the weights of a graph's sites; a weight that several nodes share is packed once.

    `rounding` makes the codes of linear layers.
    """

    def __init__(self, graph: Graph, rounding: Rounding = round_to_nearest) -> None:
        self.graph = graph
        self._rounding = rounding
        self._beside: dict[str, tuple[Array, Array]] = {}
        self._packed: dict[str, Packed] = {}
        """Of weights that several nodes read: what no other will ask for is not held."""
        self._readers = Counter(name for node in graph.nodes for name in node.input)
        self._small: dict[str, bool] = {}
        self._stems = {stem for name in self._tensors() for stem in _stems(name)}

    def _tensors(self) -> Iterator[str]:
        for made in self.graph.nodes:
            yield from made.output
        for given in (self.graph.model.graph.input, self.graph.model.graph.initializer):
            yield from (entry.name for entry in given)

    def label(self, site: Site) -> str:
        """What the names of tensors in a site's stand-in begin with; no tensor's does yet."""
        label: str = site.node.name
        while label in self._stems:
            label += "~"
        return label

    def block(self, site: Site, form: Form) -> int | None:
        """Weights per scale; None where the form has no block that fits the site's rows."""
        columns = site.columns
        if form.kind == "w8a8":
            return columns
        wanted = form.group or schemes.get(form.scheme).BLOCK or BLOCK
        if form.kind == "matmul" and form.scheme not in (*TABLES, "int8"):
            # A tail is padded with zeros; blocks are powers of two.
            return min(wanted, 1 << (columns.bit_length() - 1)) if columns >= 16 else None
        smallest = 32 if form.kind == "w" else 16
        sizes = [size for size in (256, 128, 64, 32, 16) if min(smallest, wanted) <= size <= wanted]
        dividing = next((size for size in sizes if columns % size == 0), None)
        if dividing is None and form.scheme == "int8" and form.kind != "gather":
            return columns if form.kind == "w" else 16 if columns >= 16 else None
        return dividing

    def half_scales(self, site: Site, form: Form) -> bool:
        """Whether a form's scales of this weight are stored as half-precision numbers."""
        if form.kind == "w8a8" or form.scheme in TABLES:
            return False
        if site.weight not in self._small:
            rows = np.abs(self.matrix(site)).max(axis=1)
            normal = rows.max() < 2.0**15 and rows[rows > 0].min(initial=np.inf) > 2.0**-7
            self._small[site.weight] = bool(normal)
        return self._small[site.weight]

    def pack(self, site: Site, form: Form, **options: Any) -> tuple[Packed, str]:
        """The packed weight, and a stem for the names of its constants."""
        stem = f"{site.weight}/{form.scheme}" + "-asym" * form.asymmetric
        stem += f"-r{form.rank}" if form.rank else ""
        stem += "".join(f"-{name}{value}" for name, value in sorted(options.items()))
        if form.asymmetric:
            options["asymmetric"] = True
        if self.half_scales(site, form):
            options["scale_dtype"], stem = np.float16, f"{stem}-f16"
        packed = self._packed.get(stem)
        if packed is None:
            scheme, w = schemes.get(form.scheme), self.matrix(site)
            if form.rank:
                left, right = self._split(site, form)
                w = w - left.astype(np.float32) @ right.astype(np.float32)
            rounding = self._rounding if site.kind in ("linear", "matrix") else round_to_nearest
            packed = rounding(site, w, scheme, options)
            if self._readers[site.weight] > 1:
                self._packed[stem] = packed
        return packed, stem

    def beside(
        self, site: Site, form: Form, stem: str, label: str
    ) -> tuple[list[NodeProto], list[str], int]:
        """The part beside the codes: nodes, what they make [n, rank] and [rank, k], bits stored."""
        nodes, wide = [], []
        for name, part in zip(("left", "right"), self._split(site, form), strict=True):
            made, tensor = self.widened(f"{stem}/{name}", part, f"{label}/w_{name}")
            nodes += made
            wide.append(tensor)
        return nodes, wide, 16 * form.rank * (site.rows + site.columns)

    def _split(self, site: Site, form: Form) -> tuple[Array, Array]:
        """The part of largest singular values, float16: what is left has fewer outliers.

        Li et al., "SVDQuant: Absorbing Outliers by Low-Rank Components for 4-Bit Diffusion Models"
        (arXiv 2411.05007).
        """
        key = f"{site.weight} {form.rank}"
        if key not in self._beside:
            u, sizes, v = np.linalg.svd(self.matrix(site), full_matrices=False)
            root = np.sqrt(sizes[: form.rank])
            left, right = u[:, : form.rank] * root, root[:, None] * v[: form.rank]
            self._beside[key] = left.astype(np.float16), right.astype(np.float16)
        return self._beside[key]

    def matrix(self, site: Site) -> Array:
        """The weight as [rows, columns] float32, rows being outputs."""
        w = self.graph.array(site.weight)
        if site.swapped:
            w = np.swapaxes(w, 0, 1)
        return np.ascontiguousarray(w, np.float32).reshape(site.rows, site.columns)

    def constant(self, name: str, value: Callable[[], Array]) -> str:
        """A constant of the graph, made unless it is there."""
        return name if self.graph.has(name) else self.graph.add(name, value())

    def widened(self, name: str, values: Array, label: str) -> tuple[list[NodeProto], str]:
        """A constant, widened to float32 by a node that ORT folds where it is half-precision."""
        stored = self.constant(name, lambda: values)
        if values.dtype != np.float16:
            return [], stored
        return [node("Cast", [stored], label, to=TensorProto.FLOAT)], label

    def planes(self, stem: str, make: Callable[[], list[Array]], count: int) -> list[str]:
        """Constants that hold the planes of a weight's codes."""
        names = [f"{stem}/plane{index}" for index in range(count)]
        if not self.graph.has(names[0]):
            for name, plane in zip(names, make(), strict=True):
                self.graph.add(name, plane)
        return names


def _stems(name: str) -> Iterator[str]:
    """What comes before each `/` of a tensor's name, `/y` at its end apart: no stand-in has one."""
    parts = name.removesuffix("/y").split("/")
    return ("/".join(parts[:count]) for count in range(1, len(parts)))


def masked(w: Array) -> bool:
    """Whether a weight has zeros that stand for what an output must not depend on.

    Rounded to the nearest they stay zeros; methods that spread errors, and a part of low rank,
    would fill them in, and an autoregressive flow would be none any more.
    """
    return float(np.mean(w == 0)) > MASKED_SHARE


def with_weight(original: NodeProto, place: int, weight: str) -> NodeProto:
    """A copy of a node that reads another weight."""
    copy = NodeProto()
    copy.CopyFrom(original)
    copy.input[place] = weight
    return copy


def signed(codes: Array) -> Array:
    """8-bit codes around 128 as int8."""
    return (codes ^ np.uint8(0x80)).view(np.int8)
