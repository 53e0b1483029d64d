"""`w8a8`: a convolution in int8 arithmetic, its ranges known beforehand."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
from onnx import NodeProto

from leangen.graph_edit import Array, Range
from leangen.sites import Site
from leangen.treatments.forms import Form
from leangen.treatments.unpacking import node as make
from leangen.treatments.weights import Weights, signed


def static_int8(
    weights: Weights, site: Site, form: Form, ranges: Mapping[str, Range]
) -> tuple[list[NodeProto], int]:
    """Quantize and dequantize pairs around a convolution, which ORT fuses; nodes, bits stored."""
    packed, stem = weights.pack(site, form, q_max=63)
    label, graph = weights.label(site), weights.graph
    shared, shape = graph.add_shared, graph.shape(site.weight)
    codes = weights.constant(f"{stem}/signed", lambda: signed(packed.q).reshape(shape))
    scale = weights.constant(f"{stem}/scale", lambda: packed.scales[:, 0])
    zero = shared(np.zeros(site.rows, np.int8))
    source, target = site.node.input[0], site.node.output[0]
    scale_x, zero_x = _affine(ranges[source])
    scale_y, zero_y = _affine(ranges[target])
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
        bias = graph.array(site.node.input[2]).astype(np.float64)
        limit = 2**31 - 1
        rounded = np.clip(np.rint(bias / step), -limit, limit).astype(np.int32)
        bias_q = graph.add(f"{label}/bias_q", rounded)
        bias_scale = graph.add(f"{label}/bias_scale", step)
        nodes.append(make("DequantizeLinear", [bias_q, bias_scale], f"{label}/b", axis=0))
        conv.input[2] = f"{label}/b"
    conv.output[0] = f"{label}/unrounded"
    nodes.append(conv)
    nodes += _qdq(f"{label}/unrounded", target, shared(scale_y), shared(zero_y))
    return nodes, packed.stored_bits


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
