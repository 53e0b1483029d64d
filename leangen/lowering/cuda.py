"""`CudaLinear` and `CudaAttention` in place of `Linear` and `Attention`, for an NVIDIA card.

The other rules have drawn all into these two already; here weights change from the layout for CPUs
to the one for tensor cores, bit for bit. A graph with a node that the card's kernels do not take
stays with ONNX Runtime's own operators as a whole: on the CPU provider that node would cost a copy
in each direction for every token.
"""

from __future__ import annotations

import numpy as np
from leangen_kernels import layout
from leangen_kernels.cuda import launches, tiles
from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering.draft import DOMAIN, Draft

_LINEAR_INPUTS = 6
WIDTHS = (64, 128)
"""Of heads."""


def rewrite(graph: Draft) -> str | None:
    """Move every node of leangen's; or why the graph cannot go, which is then half changed."""
    for node in graph.all("Linear"):
        why = _linear(graph, node)
        if why is not None:
            return why
    for node in graph.all("Attention"):
        why = _attention(graph, node)
        if why is not None:
            return why
    left = [node.op_type for node in graph.sorted() if node.domain == DOMAIN]
    other = sorted({name for name in left if not name.startswith("Cuda")})
    return f"there is no {other[0]} for a card" if other else None


def _linear(graph: Draft, node: NodeProto) -> str | None:
    options = attributes(node)
    form = layout.FORMS[options["form"].decode()]
    n, k = options["n"], options["k"]
    codes, scales, minima = layout.unpack(form, graph.array(node.input[1]), n, k)
    if form.split:
        form = layout.FORMS[f"{form.kernel}_wide"]
    if form.kernel == "q5":  # which a card holds in 8 bits
        codes = codes + np.uint8(128 - form.center)
        form = layout.form_for(8, scales)
    if not tiles.holds(form):
        return f"{node.name}: weights of the form {form.name}"
    if k > launches.MOST_COLUMNS:
        return f"{node.name}: rows of {k}, more than {launches.MOST_COLUMNS}"
    packed = tiles.pack(form, codes, scales, minima)
    inputs = [*node.input, *[""] * _LINEAR_INPUTS][:_LINEAR_INPUTS]
    inputs[1] = graph.add(f"{node.name}/tiles", packed)
    if form.table:
        inputs.append(graph.add(f"{node.name}/table", np.array(form.table, np.float32)))
    graph.remove(node)
    options["form"] = form.name
    graph.put("CudaLinear", node.name, inputs, list(node.output), **options)
    return None


def _attention(graph: Draft, node: NodeProto) -> str | None:
    width = graph.stated_shape(node.input[1])[-1]
    if width not in WIDTHS:
        return f"{node.name}: heads of {width}, not of {' or '.join(map(str, WIDTHS))}"
    gains = [name for name in node.input[6:] if name]
    if any(graph.shape(gain) != (width,) for gain in gains):
        return f"{node.name}: a norm over all heads"
    graph.remove(node)
    graph.put("CudaAttention", node.name, list(node.input), list(node.output), **attributes(node))
    return None
