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
    label, shared, bits = weights.label(site), weights.graph.add_shared, form.code_bits
    shape = weights.graph.shape(site.weight)
    blocks = packed.q.reshape(site.rows, -1, block)
    centred, scaled = f"{label}/w_centred", f"{label}/w_scaled"
    extra_bits = 0
    if bits == 8:
        q = weights.constant(f"{stem}/signed", lambda: signed(blocks))
        nodes = [make("Cast", [q], centred, to=TensorProto.FLOAT)]
    elif form.scheme in TABLES:
        planes = weights.planes(stem, lambda: packing.planes(blocks, bits), 1)
        nodes, index = unpacking.codes(planes, bits, f"{label}/w", TensorProto.INT32, shared)
        nodes.append(make("Gather", [shared(schemes.get(form.scheme).TABLE), index], centred))
    else:
        count = 2 if bits == 3 else 1
        planes = weights.planes(stem, lambda: packing.planes(blocks, bits), count)
        nodes, wide = unpacking.codes(planes, bits, f"{label}/w", TensorProto.FLOAT, shared)
        zero = shared(np.float32(1 << (bits - 1)))
        if packed.zero_points is not None:
            zeros = packed.zero_points[..., None]
            stored = weights.constant(f"{stem}/zeros", lambda: zeros)
            zero, extra_bits = f"{label}/w_zeros", zeros.size * (8 - bits)
            nodes.append(make("Cast", [stored], zero, to=TensorProto.FLOAT))
        nodes.append(make("Sub", [wide, zero], centred))
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
