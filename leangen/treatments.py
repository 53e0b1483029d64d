"""What can become of a node with weights: the ONNX nodes that stand in for it.

    w8a8              7 of 8 bits per row: static QDQ around a convolution, u8 x s8 arithmetic
    w8, w4            8 or 4 bits per block (8 also per row): unpacked by standard ops that ORT
                      folds when it loads; small on disk, runs as fp32 does
    matmul8, matmul4  8 or 4 bits per block: MatMulNBits, activations rounded to int8 per block
    w16               half precision, likewise: for weights that 8 bits harm
    gather8           8 bits per block: GatherBlockQuantized unpacks only the rows asked for

A DequantizeLinear on a convolution's weight would run anew for every inference (ORT folds it only
with a session option); Cast and Mul are folded always, and need no newer opset than the graph has.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen.graph_edit import Array, Graph, Range
from leangen.schemes import Packed, int4, int8
from leangen.sites import Site

MICROSOFT = "com.microsoft"
CODE_BITS = {"w4": 4, "matmul4": 4, "w8": 8, "w8a8": 8, "matmul8": 8, "gather8": 8, "w16": 16}
"""Bits of a weight's code, by treatment."""
BLOCK = 32
"""Weights per scale in blockwise forms; MatMulNBits rounds activations in the same blocks."""


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
    """Makes the stand-ins; a weight that several nodes share is packed once.

    `ranges` holds the range of every tensor around the convolutions, where `w8a8` is wanted.
    """

    def __init__(self, graph: Graph, ranges: Mapping[str, Range] | None = None) -> None:
        self._graph = graph
        self._ranges = ranges or {}
        self._packed: dict[tuple[str, str], Packed] = {}

    def offered(self, site: Site) -> list[str]:
        """The treatments that fit a site, those of fewest bits first."""
        node = site.node
        if site.kind == "embedding":
            return ["gather8"] if self._block8(site) else []
        offered = ["w4", "w8", "w16"] if site.columns % BLOCK == 0 else ["w8", "w16"]
        if site.kind == "linear" and site.columns >= 16:
            offered += ["matmul4", "matmul8"]
        if site.kind == "conv" and {node.input[0], node.output[0]} <= self._ranges.keys():
            offered.append("w8a8")
        return offered

    def apply(self, site: Site, treatment: str) -> Treated:
        """The nodes that do what the site's node does, with its weight packed."""
        make: dict[str, Callable[[Site], tuple[list[NodeProto], int]]] = {
            "w8a8": self._static_int8,
            "w8": lambda site: self._unpacked(site, int8),
            "w4": lambda site: self._unpacked(site, int4),
            "w16": self._half,
            "matmul8": self._matmul8,
            "matmul4": self._matmul4,
            "gather8": self._gather8,
        }
        nodes, stored_bits = make[treatment](site)
        return Treated(treatment, nodes, CODE_BITS[treatment], stored_bits)

    def _matrix(self, site: Site) -> Array:
        """The weight as [rows, columns] float32, rows being outputs."""
        w = self._graph.array(site.weight)
        if site.swapped:
            w = np.swapaxes(w, 0, 1)
        return np.ascontiguousarray(w, np.float32).reshape(site.rows, site.columns)

    def _pack(self, site: Site, form: str, quantize: Callable[[Array], Packed]) -> Packed:
        key = (site.weight, form)
        if key not in self._packed:
            self._packed[key] = quantize(self._matrix(site))
        return self._packed[key]

    def _constant(self, name: str, make: Callable[[], Array]) -> str:
        return name if self._graph.has(name) else self._graph.add(name, make())

    # Convolutions

    def _static_int8(self, site: Site) -> tuple[list[NodeProto], int]:
        packed = self._pack(site, "7bit", lambda w: int8.quantize(w, q_max=63))
        name, node = site.weight, site.node
        source, target = node.input[0], node.output[0]
        add, shared = self._constant, self._graph.add_shared
        codes = add(f"{name}/q7", lambda: _signed(packed.q).reshape(self._graph.shape(name)))
        scale = add(f"{name}/q7_scale", lambda: packed.scales[:, 0])
        zero = shared(np.zeros(site.rows, np.int8))
        scale_x, zero_x = _affine(self._ranges[source])
        scale_y, zero_y = _affine(self._ranges[target])
        conv = NodeProto()
        conv.CopyFrom(node)
        nodes = [
            *_qdq(source, f"{node.name}/x", shared(scale_x), shared(zero_x)),
            _node("DequantizeLinear", [codes, scale, zero], f"{node.name}/w", axis=0),
        ]
        conv.input[0], conv.input[1] = f"{node.name}/x", f"{node.name}/w"
        if len(node.input) > 2 and node.input[2]:
            # ORT's int8 convolution adds the bias to its int32 sums.
            step = (packed.scales[:, 0].astype(np.float64) * float(scale_x)).astype(np.float32)
            bias = self._graph.array(node.input[2]).astype(np.float64)
            limit = 2**31 - 1
            rounded = np.clip(np.rint(bias / step), -limit, limit).astype(np.int32)
            bias_q = self._graph.add(f"{node.name}/bias_q", rounded)
            bias_scale = self._graph.add(f"{node.name}/bias_scale", step)
            nodes.append(_node("DequantizeLinear", [bias_q, bias_scale], f"{node.name}/b", axis=0))
            conv.input[2] = f"{node.name}/b"
        conv.output[0] = f"{node.name}/y"
        nodes.append(conv)
        nodes += _qdq(f"{node.name}/y", target, shared(scale_y), shared(zero_y))
        return nodes, packed.stored_bits

    def _unpacked(self, site: Site, scheme: ModuleType) -> tuple[list[NodeProto], int]:
        bits: int = scheme.BITS
        block = BLOCK if site.columns % BLOCK == 0 else site.columns
        packed = self._pack(site, f"unpacked{bits}", lambda w: _with_small_scales(scheme, w, block))
        name, label, shared = site.weight, site.node.name, self._graph.add_shared
        shape = self._graph.shape(name)
        blocks = packed.q.reshape(site.rows, -1, block)
        signed, scaled = f"{label}/w_signed", f"{label}/w_scaled"
        if bits == 4:
            # Low nibbles hold a block's first half, high ones its second: Concat joins them.
            half = block // 2
            q = self._constant(f"{name}/q4", lambda: blocks[..., :half] | blocks[..., half:] << 4)
            low, high, codes, wide = (f"{label}/w_{x}" for x in ("low", "high", "codes", "wide"))
            nodes = [
                _node("Mod", [q, shared(np.uint8(16))], low),
                _node("BitShift", [q, shared(np.uint8(4))], high, direction="RIGHT"),
                _node("Concat", [low, high], codes, axis=2),
                _node("Cast", [codes], wide, to=TensorProto.FLOAT),
                _node("Sub", [wide, shared(np.float32(8))], signed),
            ]
        else:
            q = self._constant(f"{name}/q8", lambda: _signed(blocks))
            nodes = [_node("Cast", [q], signed, to=TensorProto.FLOAT)]
        scale = self._constant(f"{name}/q{bits}_scale", lambda: packed.scales[..., None])
        if packed.scales.dtype == np.float16:
            nodes.append(_node("Cast", [scale], f"{label}/w_scale", to=TensorProto.FLOAT))
            scale = f"{label}/w_scale"
        inner = (shape[1], shape[0], *shape[2:]) if site.swapped else shape
        last = f"{label}/w_inner" if site.swapped else f"{label}/w"
        nodes += [
            _node("Mul", [signed, scale], scaled),
            _node("Reshape", [scaled, shared(np.array(inner, np.int64))], last),
        ]
        if site.swapped:
            order = [1, 0, *range(2, len(shape))]
            nodes.append(_node("Transpose", [last], f"{label}/w", perm=order))
        return [*nodes, _with_weight(site.node, f"{label}/w")], packed.stored_bits

    def _half(self, site: Site) -> tuple[list[NodeProto], int]:
        name, label = site.weight, site.node.name
        half = self._constant(f"{name}/f16", lambda: self._graph.array(name).astype(np.float16))
        cast = _node("Cast", [half], f"{label}/w", to=TensorProto.FLOAT)
        return [cast, _with_weight(site.node, f"{label}/w")], 16 * site.weights

    # Linear layers and embeddings

    def _matmul8(self, site: Site) -> tuple[list[NodeProto], int]:
        return self._matmul(site, 8, self._block8(site) or 16)

    def _matmul4(self, site: Site) -> tuple[list[NodeProto], int]:
        return self._matmul(site, 4, BLOCK if site.columns >= BLOCK else 16)

    def _matmul(self, site: Site, bits: int, block: int) -> tuple[list[NodeProto], int]:
        scheme = int8 if bits == 8 else int4
        packed = self._pack(site, f"block{bits}", lambda w: scheme.quantize(w, block_size=block))
        name, node = site.weight, site.node
        q = self._constant(f"{name}/b{bits}", lambda: _nbits_layout(packed))
        scale = self._constant(f"{name}/b{bits}_scale", lambda: packed.scales)
        inputs = [node.input[0], q, scale]
        if len(node.input) > 2 and node.input[2]:
            inputs += ["", "", node.input[2]]
        self._graph.require(MICROSOFT)
        matmul = helper.make_node(
            "MatMulNBits",
            inputs,
            list(node.output),
            node.name,
            domain=MICROSOFT,
            K=site.columns,
            N=site.rows,
            bits=bits,
            block_size=block,
            accuracy_level=4,  # without it ORT takes a path 4 to 100 times slower
        )
        return [matmul], packed.stored_bits

    def _block8(self, site: Site) -> int | None:
        """The largest block of 8-bit weights that divides a row, or None."""
        return next((size for size in (BLOCK, 16) if site.columns % size == 0), None)

    def _gather8(self, site: Site) -> tuple[list[NodeProto], int]:
        block = self._block8(site)
        packed = self._pack(site, "block8", lambda w: int8.quantize(w, block_size=block))
        name, node = site.weight, site.node
        q = self._constant(f"{name}/rows8", lambda: packed.q)
        scale = self._constant(f"{name}/b8_scale", lambda: packed.scales)
        self._graph.require(MICROSOFT)
        gather = helper.make_node(
            "GatherBlockQuantized",
            [q, node.input[1], scale],
            list(node.output),
            node.name,
            domain=MICROSOFT,
            bits=8,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
        return [gather], packed.stored_bits


def _node(op: str, inputs: list[str], output: str, **options: Any) -> NodeProto:
    return helper.make_node(op, inputs, [output], f"{output}/{op}", **options)


def _with_weight(node: NodeProto, weight: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[1] = weight
    return copy


def _qdq(source: str, target: str, scale: str, zero: str) -> list[NodeProto]:
    return [
        _node("QuantizeLinear", [source, scale, zero], f"{target}/u8"),
        _node("DequantizeLinear", [f"{target}/u8", scale, zero], target),
    ]


def _affine(span: Range) -> tuple[Array, Array]:
    """Scale and zero point of uint8 over a range; zero is exact, as padding needs it."""
    low, high = min(span.low, 0.0), max(span.high, 0.0)
    scale = np.float32(max((high - low) / 255, 1e-12))
    zero = np.uint8(np.clip(round(-low / float(scale)), 0, 255))
    return np.asarray(scale), np.asarray(zero)


def _signed(codes: Array) -> Array:
    """8-bit codes around 128 as int8."""
    return (codes ^ np.uint8(0x80)).view(np.int8)


def _with_small_scales(scheme: ModuleType, w: Array, block: int) -> Packed:
    """Quantized with float16 scales where those hold the weights' size, else with float32 ones."""
    rows = np.abs(w).max(axis=1)
    largest, smallest = rows.max(), rows[rows > 0].min(initial=np.inf)
    fits = largest < 2.0**15 and smallest > 2.0**-7  # scales stay normal float16 numbers
    dtype = np.float16 if fits else np.float32
    packed: Packed = scheme.quantize(w, block_size=block, scale_dtype=dtype)
    return packed


def _nbits_layout(packed: Packed) -> Array:
    """Codes as MatMulNBits reads them: [n, blocks, bytes of a block], low nibble first."""
    n, k = packed.shape
    blocks = packed.scales.shape[1]
    codes: Array = packed.q
    if blocks * packed.block_size != k:
        codes = np.full((n, blocks * packed.block_size), 1 << (packed.bits - 1), np.uint8)
        codes[:, :k] = packed.q
    if packed.bits == 4:
        codes = codes[:, 0::2] | codes[:, 1::2] << 4
    return codes.reshape(n, blocks, -1)
