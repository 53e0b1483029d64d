"""`wCODE`: weights unpacked when ORT loads the graph, small on disk, computed as fp32."""

from __future__ import annotations

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen import schemes
from leangen.graph_edit import Array
from leangen.sites import Site
from leangen.treatments import packing, unpacking
from leangen.treatments.forms import TABLES, Form
from leangen.treatments.unpacking import node as make
from leangen.treatments.weights import Weights, signed, with_weight

_TYPES = {"fp16": TensorProto.FLOAT16, "bf16": TensorProto.BFLOAT16}


def unpacked(weights: Weights, site: Site, form: Form) -> tuple[list[NodeProto], int]:
    """Codes and scales that standard operators turn into the weight; nodes, bits stored."""
    block = weights.block(site, form) or site.columns
    packed, stem = weights.pack(site, form, block_size=block)
    label, shared = weights.label(site), weights.graph.add_shared
    shape = weights.graph.shape(site.weight)
    centred, scaled = f"{label}/w_centred", f"{label}/w_scaled"
    blocks = packed.q.reshape(site.rows, -1, block)
    zero_points = None if packed.zero_points is None else packed.zero_points[..., None]
    nodes, extra_bits = _centred(weights, form, stem, label, blocks, zero_points)
    widen, scale = weights.widened(
        f"{stem}/block_scale", packed.scales[..., None], f"{label}/w_scale"
    )
    inner = shared(np.array((shape[1], shape[0], *shape[2:]) if site.swapped else shape, np.int64))
    last = f"{label}/w_inner" if site.swapped else f"{label}/w"
    of_codes = f"{label}/w_codes" if form.rank else last
    nodes += [
        *widen,
        make("Mul", [centred, scale], scaled),
        make("Reshape", [scaled, inner], of_codes),
    ]
    if form.rank:
        parts, (left, right), bits_beside = weights.beside(site, form, stem, label)
        beside, shaped = f"{label}/w_flat", f"{label}/w_beside"
        nodes += [
            *parts,
            make("MatMul", [left, right], beside),
            make("Reshape", [beside, inner], shaped),
            make("Add", [of_codes, shaped], last),
        ]
        extra_bits += bits_beside
    if site.swapped:
        order = [1, 0, *range(2, len(shape))]
        nodes.append(make("Transpose", [last], f"{label}/w", perm=order))
    return [
        *nodes,
        with_weight(site.node, site.place, f"{label}/w"),
    ], packed.stored_bits + extra_bits


def _centred(
    weights: Weights, form: Form, stem: str, label: str, blocks: Array, zero_points: Array | None
) -> tuple[list[NodeProto], int]:
    """Codes as floats less what stands for 0; nodes, bits stored beside the codes' own."""
    shared, bits, centred = weights.graph.add_shared, form.code_bits, f"{label}/w_centred"
    if bits == 8:
        q = weights.constant(f"{stem}/signed", lambda: signed(blocks))
        return [make("Cast", [q], centred, to=TensorProto.FLOAT)], 0
    if form.scheme in TABLES:
        planes = weights.planes(stem, lambda: packing.planes(blocks, bits), 1)
        nodes, index = unpacking.codes(planes, bits, f"{label}/w", TensorProto.INT32, shared)
        table = shared(schemes.get(form.scheme).TABLE)
        return [*nodes, make("Gather", [table, index], centred)], 0
    count = 2 if bits == 3 else 1
    planes = weights.planes(stem, lambda: packing.planes(blocks, bits), count)
    nodes, wide = unpacking.codes(planes, bits, f"{label}/w", TensorProto.FLOAT, shared)
    zero, extra_bits = shared(np.float32(1 << (bits - 1))), 0
    if zero_points is not None:
        stored = weights.constant(f"{stem}/zeros", lambda: zero_points)
        zero, extra_bits = f"{label}/w_zeros", zero_points.size * (8 - bits)
        nodes.append(make("Cast", [stored], zero, to=TensorProto.FLOAT))
    return [*nodes, make("Sub", [wide, zero], centred)], extra_bits


def half(weights: Weights, site: Site, form: Form) -> tuple[list[NodeProto], int]:
    """A weight, or the rows of an embedding, in 16 bits and widened."""
    label, name = weights.label(site), f"{site.weight}/{form.scheme}"
    scheme = schemes.get(form.scheme)
    dtype = helper.tensor_dtype_to_np_dtype(_TYPES[form.scheme])

    def halves() -> Array:
        w = weights.graph.array(site.weight)
        codes = scheme.quantize(np.asarray(w, np.float32).reshape(len(w), -1)).q
        return np.asarray(codes.view(dtype).reshape(w.shape))

    stored = weights.constant(name, halves)
    bits = 16 * site.weights
    if form.kind == "gather":  # widen the rows asked for, not the table
        gather = with_weight(site.node, 0, stored)
        gather.output[0] = f"{label}/rows"
        widen = make("Cast", [gather.output[0]], site.node.output[0], to=TensorProto.FLOAT)
        return [gather, widen], bits
    cast = make("Cast", [stored], f"{label}/w", to=TensorProto.FLOAT)
    return [cast, with_weight(site.node, site.place, f"{label}/w")], bits
