"""What can become of a node with weights: the ONNX nodes that stand in for it.

`forms` reads the names of treatments, `weights` packs, and one module for each kind of stand-in
makes its nodes: `floats`, `static`, `products`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
from onnx import NodeProto

from leangen import methods
from leangen.graph_edit import Graph, Range
from leangen.precision import HALVES
from leangen.sites import Site
from leangen.treatments import floats, products, static
from leangen.treatments.forms import STANDARD, TABLES, Form, code_bits, read
from leangen.treatments.weights import Rounding, Weights, masked, round_to_nearest

__all__ = ["STANDARD", "Form", "Rounding", "Treated", "Treatments", "code_bits", "read"]


@dataclass(frozen=True, slots=True)
class Treated:
    """The stand-in for a node."""

    treatment: str
    nodes: list[NodeProto]
    code_bits: int
    """Bits of one code."""
    stored_bits: int
    """Codes, scales and zero points of the whole weight."""


class Treatments:
    """Makes the stand-ins for the nodes of a graph.

    `ranges` holds the range of every tensor around the convolutions, where `w8a8` is wanted.
    `rounding` makes the codes of linear layers.
    """

    def __init__(
        self,
        graph: Graph,
        ranges: Mapping[str, Range] | None = None,
        rounding: Rounding = round_to_nearest,
    ) -> None:
        self._graph = graph
        self._ranges = ranges or {}
        self._weights = Weights(graph, rounding)
        self._made: dict[tuple[str, str], Treated] = {}

    def offered(self, site: Site) -> list[str]:
        """The standard treatments that fit a site."""
        return [treatment for treatment in STANDARD if self.fits(site, treatment)]

    def fits(self, site: Site, treatment: str) -> bool:
        """Whether a treatment can be given to a site."""
        form = read(treatment)
        if form.kind == "w8a8":
            around = {site.node.input[0], site.node.output[0]}
            return site.kind == "conv" and around <= self._ranges.keys()
        least = {"bf16": 13, "int3": 18 if form.kind == "matmul" else 0}.get(form.scheme, 0)
        if self._graph.opset < least:
            return False
        if form.scheme == "fp16" and np.abs(self._graph.array(site.weight)).max() > 65504:
            return False
        if form.rank and not self._splits(site, form):
            return False
        blocks = form.scheme in HALVES or self._weights.block(site, form) is not None
        if form.kind == "gather":
            return site.kind == "embedding" and blocks
        if site.kind == "embedding" or (form.kind == "matmul" and site.kind != "linear"):
            return False
        return blocks

    def _splits(self, site: Site, form: Form) -> bool:
        """Whether a part of the form's rank can stand beside a site's codes."""
        return (
            site.kind in ("conv", "deconv", "linear")
            and form.scheme in methods.SCHEMES
            and form.rank < min(site.rows, site.columns) / 2
            and not masked(self._weights.matrix(site))
        )

    def stored_bits(self, site: Site, treatment: str) -> float:
        """About how many bits a site's weight takes with a treatment."""
        if treatment == "fp32":
            return 32.0 * site.weights
        form = read(treatment)
        if form.scheme in HALVES:
            return 16.0 * site.weights
        block = self._weights.block(site, form) or site.columns
        scale = 16 if self._weights.half_scales(site, form) else 32
        zero = (8 if form.kind == "w" else form.code_bits) if form.asymmetric else 0
        blocks = site.rows * -(-site.columns // block)
        beside = 16 * form.rank * (site.rows + site.columns)
        return float(blocks * (block * form.code_bits + scale + zero) + beside)

    def apply(self, site: Site, treatment: str) -> Treated:
        """The nodes that do what the site's node does, with its weight packed; made once."""
        key = site.node.name, treatment
        if key not in self._made:
            self._made[key] = self._make(site, treatment)
        return self._made[key]

    def _make(self, site: Site, treatment: str) -> Treated:
        form = read(treatment)
        if form.kind == "w8a8":
            made = static.static_int8(self._weights, site, form, self._ranges)
        elif form.scheme in HALVES:
            made = floats.half(self._weights, site, form)
        elif form.kind == "w":
            made = floats.unpacked(self._weights, site, form)
        elif form.kind == "gather":
            made = products.gather(self._weights, site, form)
        elif form.scheme in TABLES:
            made = products.bnb(self._weights, site, form)
        else:
            made = products.nbits(self._weights, site, form)
        nodes, stored_bits = made
        return Treated(treatment, nodes, form.code_bits, stored_bits)
