"""`matmulCODE` and `gatherCODE`: ONNX Runtime's operators that compute with packed weights."""

from __future__ import annotations

from typing import Any

from onnx import NodeProto, helper

from leangen.sites import Site
from leangen.treatments import packing, unpacking
from leangen.treatments.forms import Form
from leangen.treatments.unpacking import node as make
from leangen.treatments.weights import Weights

MICROSOFT = "com.microsoft"
_INT8_ACTIVATIONS, _FP32_ACTIVATIONS = 4, 1  # MatMulNBits' accuracy_level
_BNB_TYPES = {"fp4": 0, "nf4": 1}


def nbits(weights: Weights, site: Site, form: Form) -> tuple[list[NodeProto], int]:
    """`MatMulNBits` with integer codes; nodes, bits stored."""
    block = weights.block(site, form)
    packed, stem = weights.pack(site, form, block_size=block)
    node, bits, label = site.node, form.code_bits, weights.label(site)
    nodes: list[NodeProto] = []
    if bits == 3:
        planes = weights.planes(f"{stem}/pairs", lambda: packing.pair_planes(packed), 2)
        centred, bits = packed.zero_points is None, 4
        shared = weights.graph.add_shared
        nodes, q = unpacking.nibbles(planes, f"{label}/w", centred, shared)
    else:
        q = weights.constant(f"{stem}/codes", lambda: packing.nbits_layout(packed))
    widen, scale = weights.widened(f"{stem}/scale", packed.scales, f"{label}/w_scale")
    inputs = [node.input[0], q, scale]
    # Whole blocks are stored, and whole bytes of zero points.
    extra_bits = (packed.scales.size * packed.block_size - packed.q.size) * form.code_bits
    if packed.zero_points is not None:
        zeros = packing.nbits_zero_points(packed, bits)
        inputs.append(weights.constant(f"{stem}/zeros", lambda: zeros))
        extra_bits += zeros.size * 8 - packed.zero_points.size * form.code_bits
    if len(node.input) > 2 and node.input[2]:
        inputs += [""] * (5 - len(inputs)) + [node.input[2]]
    level = _FP32_ACTIVATIONS if form.weights_only else _INT8_ACTIVATIONS
    product = _product(
        "MatMulNBits",
        weights,
        site,
        inputs,
        bits=bits,
        block_size=block,
        accuracy_level=level,  # without it ORT takes a path 4 to 100 times slower
    )
    nodes += [*widen, product]
    if form.rank:  # y = Q x + left (right x)
        parts, wide, bits_beside = weights.beside(site, form, stem, label)
        turned = [f"{name}_turned" for name in wide]
        nodes += parts
        for name, other in zip(wide, turned, strict=True):
            nodes.append(make("Transpose", [name], other, perm=[1, 0]))
        left, right = turned
        inner, beside = f"{label}/inner", f"{label}/beside"
        product.output[0] = f"{label}/product"
        nodes += [
            make("MatMul", [node.input[0], right], inner),
            make("MatMul", [inner, left], beside),
            make("Add", [product.output[0], beside], node.output[0]),
        ]
        extra_bits += bits_beside
    return nodes, packed.stored_bits + extra_bits


def bnb(weights: Weights, site: Site, form: Form) -> tuple[list[NodeProto], int]:
    """`MatMulBnb4` with codes that index a table; nodes, bits stored."""
    block = weights.block(site, form)
    packed, stem = weights.pack(site, form, block_size=block)
    node = site.node
    q = weights.constant(f"{stem}/codes", lambda: packing.bnb_layout(packed))
    scale = weights.constant(f"{stem}/scale", lambda: packed.scales.reshape(-1))
    inputs = [node.input[0], q, scale]
    quant_type = _BNB_TYPES[form.scheme]
    product = _product("MatMulBnb4", weights, site, inputs, block_size=block, quant_type=quant_type)
    nodes = [product]
    if len(node.input) > 2 and node.input[2]:
        product.output[0] = f"{weights.label(site)}/product"
        nodes.append(make("Add", [product.output[0], node.input[2]], node.output[0]))
    return nodes, packed.stored_bits


def gather(weights: Weights, site: Site, form: Form) -> tuple[list[NodeProto], int]:
    """`GatherBlockQuantized`, which unpacks the rows asked for; nodes, bits stored."""
    block, graph = weights.block(site, form), weights.graph
    packed, stem = weights.pack(site, form, block_size=block)
    # One place in memory and on disk with the codes of a tied head.
    q = weights.constant(f"{stem}/codes", lambda: packing.nbits_layout(packed))
    rows = weights.constant(f"{stem}/rows", lambda: graph.array(q).reshape(site.rows, -1))
    label = f"{weights.label(site)}/w_scale"
    widen, scale = weights.widened(f"{stem}/scale", packed.scales, label)
    graph.require(MICROSOFT)
    lookup = helper.make_node(
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
    return [*widen, lookup], packed.stored_bits


def _product(op: str, weights: Weights, site: Site, inputs: list[str], **options: Any) -> NodeProto:
    weights.graph.require(MICROSOFT)
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
