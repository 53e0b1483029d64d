"""What can become of a node with weights: the ONNX nodes that stand in for it.

A treatment is a form and the code of a weight, such as `w4`, `matmul4-asym-g128`, `gather8`:

    w8a8        7 of 8 bits per row: static QDQ around a convolution, u8 x s8 arithmetic
    wCODE       unpacked by standard ops that ORT folds when it loads; small on disk, runs as fp32
    matmulCODE  integers: MatMulNBits, activations rounded to int8 per block (or fp32, with -wo);
                nf4 and fp4: MatMulBnb4, activations in fp32
    gatherCODE  embedding: only the rows asked for are unpacked

CODE is 8, 4, 3, 2, nf4, fp4, 16 (half precision) or bf16, with -asym, -gN and -wo as in
`leangen.precision`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen import packing, schemes, unpacking
from leangen.graph_edit import Array, Graph, Range
from leangen.schemes import Packed
from leangen.sites import Site
from leangen.unpacking import node as make

MICROSOFT = "com.microsoft"
BLOCK = 32
"""Weights per scale where nothing else is asked; MatMulNBits rounds activations in its blocks."""
_INT8_ACTIVATIONS, _FP32_ACTIVATIONS = 4, 1  # MatMulNBits' accuracy_level
_BNB_TYPES = {"fp4": 0, "nf4": 1}
_HALVES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}
_TREATMENT = re.compile(
    r"(?P<form>w|matmul|gather)(?P<code>8|4|3|2|nf4|fp4|16|bf16)"
    r"(?P<asym>-asym)?(?:-g(?P<group>\d+))?(?P<wo>-wo)?"
)
STANDARD = (
    *("w2", "w3", "w4", "wnf4", "wfp4", "w8", "w16", "wbf16"),
    *("matmul2", "matmul3", "matmul4", "matmulnf4", "matmulfp4", "matmul8"),
    *("gather4", "gather8", "gather16", "gatherbf16", "w8a8"),
)
"""The treatments without options."""

Rounding = Callable[[Site, Array, ModuleType, Mapping[str, Any]], Packed]
"""Makes codes of a site's matrix: (site, w [n, k], scheme, its options) -> Packed."""


@dataclass(frozen=True, slots=True)
class Form:
    """A treatment's name, read."""

    kind: str
    """`w8a8`, `w`, `matmul` or `gather`."""
    scheme: str
    asymmetric: bool = False
    group: int | None = None
    weights_only: bool = False

    @property
    def code_bits(self) -> int:
        """Bits of a weight's code."""
        bits: int = schemes.get(self.scheme).BITS
        return bits


@cache
def read(treatment: str) -> Form:
    """The form that a treatment's name stands for; ValueError when it is no treatment."""
    if treatment == "w8a8":
        return Form("w8a8", "int8")
    found = _TREATMENT.fullmatch(treatment)
    if found is None:
        raise ValueError(f"{treatment!r} is no treatment: expected one such as w4, matmul4, w8a8")
    scheme = {"16": "fp16"}.get(found["code"], found["code"])
    return Form(
        found["form"],
        f"int{scheme}" if scheme.isdigit() else scheme,
        bool(found["asym"]),
        int(found["group"]) if found["group"] else None,
        bool(found["wo"]),
    )


def code_bits(treatment: str) -> int:
    """Bits of a weight's code: 32 for `fp32`, a node left as it is."""
    return 32 if treatment == "fp32" else read(treatment).code_bits


@dataclass(frozen=True, slots=True)
class Treated:
    """The stand-in for a node."""

    treatment: str
    nodes: list[NodeProto]
    code_bits: int
    """Bits of one code."""
    stored_bits: int
    """Codes, scales and zero points of the whole weight."""


def round_to_nearest(
    site: Site, w: Array, scheme: ModuleType, options: Mapping[str, Any]
) -> Packed:
    """The rounding that needs no data: each scheme's own."""
    packed: Packed = scheme.quantize(w, **options)
    return packed


class Treatments:
    """Makes the stand-ins; a weight that several nodes share is packed once.

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
        self._rounding = rounding
        self._packed: dict[str, Packed] = {}

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
        if form.kind == "gather":
            halves = form.scheme in _HALVES
            return site.kind == "embedding" and (halves or self._block(site, form) is not None)
        if site.kind == "embedding" or (form.kind == "matmul" and site.kind != "linear"):
            return False
        return form.scheme in _HALVES or self._block(site, form) is not None

    def stored_bits(self, site: Site, treatment: str) -> float:
        """About how many bits a site's weight takes with a treatment."""
        if treatment == "fp32":
            return 32.0 * site.weights
        form = read(treatment)
        if form.scheme in _HALVES:
            return 16.0 * site.weights
        block = self._block(site, form) or site.columns
        small = form.kind == "w" and form.scheme not in _BNB_TYPES and block < site.columns
        scale = 16 if small else 32
        zero = (8 if form.kind == "w" else form.code_bits) if form.asymmetric else 0
        blocks = site.rows * -(-site.columns // block)
        return float(blocks * (block * form.code_bits + scale + zero))

    def apply(self, site: Site, treatment: str) -> Treated:
        """The nodes that do what the site's node does, with its weight packed."""
        form = read(treatment)
        if form.kind == "w8a8":
            nodes, stored_bits = self._static_int8(site)
        elif form.scheme in _HALVES:
            nodes, stored_bits = self._half(site, form)
        elif form.kind == "w":
            nodes, stored_bits = self._unpacked(site, form)
        elif form.kind == "gather":
            nodes, stored_bits = self._gather(site, form)
        elif form.scheme in _BNB_TYPES:
            nodes, stored_bits = self._bnb(site, form)
        else:
            nodes, stored_bits = self._nbits(site, form)
        return Treated(treatment, nodes, form.code_bits, stored_bits)

    def _block(self, site: Site, form: Form) -> int | None:
        """Weights per scale; None where the form has no block that fits the site's rows."""
        columns = site.columns
        if form.kind == "w8a8":
            return columns
        wanted = form.group or schemes.get(form.scheme).BLOCK or BLOCK
        if form.kind == "matmul" and form.scheme not in (*_BNB_TYPES, "int8"):
            # A tail is padded with zeros; blocks are powers of two.
            return min(wanted, 1 << (columns.bit_length() - 1)) if columns >= 16 else None
        smallest = 32 if form.kind == "w" else 16
        sizes = [size for size in (256, 128, 64, 32, 16) if min(smallest, wanted) <= size <= wanted]
        dividing = next((size for size in sizes if columns % size == 0), None)
        if dividing is None and form.scheme == "int8" and form.kind != "gather":
            return columns if form.kind == "w" else 16 if columns >= 16 else None
        return dividing

    def _pack(self, site: Site, form: Form, **options: Any) -> tuple[Packed, str]:
        """The packed weight, and a stem for the names of its constants."""
        stem = f"{site.weight}/{form.scheme}" + "-asym" * form.asymmetric
        stem += "".join(f"-{name}{value}" for name, value in sorted(options.items()))
        if form.asymmetric:
            options["asymmetric"] = True
        if form.kind == "w" and form.scheme not in _BNB_TYPES and self._small_scales(site):
            options["scale_dtype"], stem = np.float16, f"{stem}-f16"
        if stem not in self._packed:
            scheme, w = schemes.get(form.scheme), self._matrix(site)
            rounding = self._rounding if site.kind == "linear" else round_to_nearest
            self._packed[stem] = rounding(site, w, scheme, options)
        return self._packed[stem], stem

    def _matrix(self, site: Site) -> Array:
        """The weight as [rows, columns] float32, rows being outputs."""
        w = self._graph.array(site.weight)
        if site.swapped:
            w = np.swapaxes(w, 0, 1)
        return np.ascontiguousarray(w, np.float32).reshape(site.rows, site.columns)

    def _small_scales(self, site: Site) -> bool:
        """Whether scales of this weight's size stay normal float16 numbers."""
        rows = np.abs(self._matrix(site)).max(axis=1)
        return bool(rows.max() < 2.0**15 and rows[rows > 0].min(initial=np.inf) > 2.0**-7)

    def _constant(self, name: str, value: Callable[[], Array]) -> str:
        return name if self._graph.has(name) else self._graph.add(name, value())

    def _planes(self, stem: str, make: Callable[[], list[Array]], count: int) -> list[str]:
        """Constants that hold the planes of a weight's codes."""
        names = [f"{stem}/plane{index}" for index in range(count)]
        if not self._graph.has(names[0]):
            for name, plane in zip(names, make(), strict=True):
                self._graph.add(name, plane)
        return names

    # Convolutions, and whatever runs as fp32

    def _static_int8(self, site: Site) -> tuple[list[NodeProto], int]:
        packed, stem = self._pack(site, Form("w8a8", "int8"), q_max=63)
        label, shared = site.node.name, self._graph.add_shared
        shape = self._graph.shape(site.weight)
        codes = self._constant(f"{stem}/codes", lambda: _signed(packed.q).reshape(shape))
        scale = self._constant(f"{stem}/scale", lambda: packed.scales[:, 0])
        zero = shared(np.zeros(site.rows, np.int8))
        source, target = site.node.input[0], site.node.output[0]
        scale_x, zero_x = _affine(self._ranges[source])
        scale_y, zero_y = _affine(self._ranges[target])
        conv = NodeProto()
        conv.CopyFrom(site.node)
        nodes = [
            *_qdq(source, f"{label}/x", shared(scale_x), shared(zero_x)),
            make("DequantizeLinear", [codes, scale, zero], f"{label}/w", axis=0),
        ]
        conv.input[0], conv.input[1] = f"{label}/x", f"{label}/w"
        if len(site.node.input) > 2 and site.node.input[2]:
            # ORT's int8 convolution adds the bias to its int32 sums.
            step = (packed.scales[:, 0].astype(np.float64) * float(scale_x)).astype(np.float32)
            bias = self._graph.array(site.node.input[2]).astype(np.float64)
            limit = 2**31 - 1
            rounded = np.clip(np.rint(bias / step), -limit, limit).astype(np.int32)
            bias_q = self._graph.add(f"{label}/bias_q", rounded)
            bias_scale = self._graph.add(f"{label}/bias_scale", step)
            nodes.append(make("DequantizeLinear", [bias_q, bias_scale], f"{label}/b", axis=0))
            conv.input[2] = f"{label}/b"
        conv.output[0] = f"{label}/unrounded"
        nodes.append(conv)
        nodes += _qdq(f"{label}/unrounded", target, shared(scale_y), shared(zero_y))
        return nodes, packed.stored_bits

    def _unpacked(self, site: Site, form: Form) -> tuple[list[NodeProto], int]:
        block = self._block(site, form) or site.columns
        packed, stem = self._pack(site, form, block_size=block)
        label, shared, bits = site.node.name, self._graph.add_shared, form.code_bits
        shape = self._graph.shape(site.weight)
        blocks = packed.q.reshape(site.rows, -1, block)
        centred, scaled = f"{label}/w_centred", f"{label}/w_scaled"
        extra_bits = 0
        if bits == 8:
            q = self._constant(f"{stem}/codes", lambda: _signed(blocks))
            nodes = [make("Cast", [q], centred, to=TensorProto.FLOAT)]
        elif form.scheme in _BNB_TYPES:
            planes = self._planes(stem, lambda: packing.planes(blocks, bits), 1)
            nodes, index = unpacking.codes(planes, bits, f"{label}/w", TensorProto.INT32, shared)
            nodes.append(make("Gather", [shared(schemes.get(form.scheme).TABLE), index], centred))
        else:
            count = 2 if bits == 3 else 1
            planes = self._planes(stem, lambda: packing.planes(blocks, bits), count)
            nodes, wide = unpacking.codes(planes, bits, f"{label}/w", TensorProto.FLOAT, shared)
            zero = shared(np.float32(1 << (bits - 1)))
            if packed.zero_points is not None:
                zeros = packed.zero_points[..., None]
                stored = self._constant(f"{stem}/zeros", lambda: zeros)
                zero, extra_bits = f"{label}/w_zeros", zeros.size * (8 - bits)
                nodes.append(make("Cast", [stored], zero, to=TensorProto.FLOAT))
            nodes.append(make("Sub", [wide, zero], centred))
        scale = self._constant(f"{stem}/scale", lambda: packed.scales[..., None])
        if packed.scales.dtype == np.float16:
            nodes.append(make("Cast", [scale], f"{label}/w_scale", to=TensorProto.FLOAT))
            scale = f"{label}/w_scale"
        inner = (shape[1], shape[0], *shape[2:]) if site.swapped else shape
        last = f"{label}/w_inner" if site.swapped else f"{label}/w"
        nodes += [
            make("Mul", [centred, scale], scaled),
            make("Reshape", [scaled, shared(np.array(inner, np.int64))], last),
        ]
        if site.swapped:
            order = [1, 0, *range(2, len(shape))]
            nodes.append(make("Transpose", [last], f"{label}/w", perm=order))
        node = _with_weight(site.node, site.place, f"{label}/w")
        return [*nodes, node], packed.stored_bits + extra_bits

    def _half(self, site: Site, form: Form) -> tuple[list[NodeProto], int]:
        label, name = site.node.name, f"{site.weight}/{form.scheme}"
        scheme = schemes.get(form.scheme)
        dtype = helper.tensor_dtype_to_np_dtype(_HALVES[form.scheme])

        def halves() -> Array:
            w = self._graph.array(site.weight)
            codes = scheme.quantize(np.asarray(w, np.float32).reshape(len(w), -1)).q
            return np.asarray(codes.view(dtype).reshape(w.shape))

        half = self._constant(name, halves)
        bits = 16 * site.weights
        if form.kind == "gather":  # widen the rows asked for, not the table
            gather = _with_weight(site.node, 0, half)
            gather.output[0] = f"{label}/rows"
            widen = make("Cast", [gather.output[0]], site.node.output[0], to=TensorProto.FLOAT)
            return [gather, widen], bits
        cast = make("Cast", [half], f"{label}/w", to=TensorProto.FLOAT)
        return [cast, _with_weight(site.node, site.place, f"{label}/w")], bits

    # Linear layers and embeddings

    def _nbits(self, site: Site, form: Form) -> tuple[list[NodeProto], int]:
        block = self._block(site, form)
        packed, stem = self._pack(site, form, block_size=block)
        node, bits = site.node, form.code_bits
        nodes: list[NodeProto] = []
        if bits == 3:
            planes = self._planes(f"{stem}/pairs", lambda: packing.pair_planes(packed), 2)
            centred, bits = packed.zero_points is None, 4
            nodes, q = unpacking.nibbles(planes, f"{node.name}/w", centred, self._graph.add_shared)
        else:
            q = self._constant(f"{stem}/codes", lambda: packing.nbits_layout(packed))
        inputs = [node.input[0], q, self._constant(f"{stem}/scale", lambda: packed.scales)]
        # Whole blocks are stored, and whole bytes of zero points.
        extra_bits = (packed.scales.size * packed.block_size - packed.q.size) * form.code_bits
        if packed.zero_points is not None:
            zeros = packing.nbits_zero_points(packed, bits)
            inputs.append(self._constant(f"{stem}/zeros", lambda: zeros))
            extra_bits += zeros.size * 8 - packed.zero_points.size * form.code_bits
        if len(node.input) > 2 and node.input[2]:
            inputs += [""] * (5 - len(inputs)) + [node.input[2]]
        level = _FP32_ACTIVATIONS if form.weights_only else _INT8_ACTIVATIONS
        product = self._product(
            "MatMulNBits",
            site,
            inputs,
            bits=bits,
            block_size=block,
            accuracy_level=level,  # without it ORT takes a path 4 to 100 times slower
        )
        return [*nodes, product], packed.stored_bits + extra_bits

    def _bnb(self, site: Site, form: Form) -> tuple[list[NodeProto], int]:
        block = self._block(site, form)
        packed, stem = self._pack(site, form, block_size=block)
        node = site.node
        q = self._constant(f"{stem}/codes", lambda: packing.bnb_layout(packed))
        scale = self._constant(f"{stem}/scale", lambda: packed.scales.reshape(-1))
        quant_type = _BNB_TYPES[form.scheme]
        inputs = [node.input[0], q, scale]
        product = self._product("MatMulBnb4", site, inputs, block_size=block, quant_type=quant_type)
        nodes = [product]
        if len(node.input) > 2 and node.input[2]:
            product.output[0] = f"{node.name}/product"
            nodes.append(make("Add", [product.output[0], node.input[2]], node.output[0]))
        return nodes, packed.stored_bits

    def _product(self, op: str, site: Site, inputs: list[str], **options: Any) -> NodeProto:
        self._graph.require(MICROSOFT)
        return helper.make_node(
            op,
            inputs,
            list(site.node.output),
            site.node.name,
            domain=MICROSOFT,
            K=site.columns,
            N=site.rows,
            **options,
        )

    def _gather(self, site: Site, form: Form) -> tuple[list[NodeProto], int]:
        block = self._block(site, form)
        packed, stem = self._pack(site, form, block_size=block)
        # One place in memory and on disk with the codes of a tied head.
        q = self._constant(f"{stem}/codes", lambda: packing.nbits_layout(packed))
        rows = self._constant(f"{stem}/rows", lambda: self._graph.array(q).reshape(site.rows, -1))
        scale = self._constant(f"{stem}/scale", lambda: packed.scales)
        self._graph.require(MICROSOFT)
        gather = helper.make_node(
            "GatherBlockQuantized",
            [rows, site.node.input[1], scale],
            list(site.node.output),
            site.node.name,
            domain=MICROSOFT,
            bits=form.code_bits,
            block_size=block,
            gather_axis=0,
            quantize_axis=1,
        )
        return [gather], packed.stored_bits


def _with_weight(node: NodeProto, place: int, weight: str) -> NodeProto:
    copy = NodeProto()
    copy.CopyFrom(node)
    copy.input[place] = weight
    return copy


def _qdq(source: str, target: str, scale: str, zero: str) -> list[NodeProto]:
    return [
        make("QuantizeLinear", [source, scale, zero], f"{target}/u8"),
        make("DequantizeLinear", [f"{target}/u8", scale, zero], target),
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
