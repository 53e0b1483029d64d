"""`Attention` in place of GroupQueryAttention, whose key cache has an order of its own.

Queries and keys may come normed, apart from the values, and not be rotated at all; scores that are
capped stay with ORT.
"""

from __future__ import annotations

from leangen_kernels import layout
from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering.draft import Draft, options_are

_NORMS = ("RMSNormalization", "SimplifiedLayerNormalization")


def replace(graph: Draft, node: NodeProto) -> bool:
    """Put `Attention` in place of a GroupQueryAttention, if it computes the same."""
    inputs: list[str] = [*node.input, *[""] * 9]
    query, key, value, past_key, past_value, lengths, _, cosines, sines = inputs[:9]
    options = attributes(node)
    heads, kv_heads = options["num_heads"], options["kv_num_heads"]
    window, rotated = options.get("local_window_size", -1), options.get("do_rotary", 0)
    known = options_are(
        node, num_heads=heads, kv_num_heads=kv_heads, local_window_size=window, do_rotary=(0, 1),
        rotary_interleaved=0, scale=options.get("scale", 0.0), softcap=0.0, smooth_softmax=(0, -1),
        qk_output=0, k_quant_type=b"NONE", v_quant_type=b"NONE", kv_cache_bit_width=0,
    )  # fmt: skip
    caches = [(past_key, node.output[1]), (past_value, node.output[2])]
    if (
        not known
        or any(inputs[9:])
        or any(node.output[3:])
        or (rotated and not (graph.has(cosines) and graph.has(sines)))
        or not all(
            graph.is_input(past)
            and graph.is_output(present)
            and len(graph.consumers(past)) == 1
            # a cache that is stated to grow is not appended to in place
            and graph.stated_shape(present) in ([], graph.stated_shape(past))
            for past, present in caches
        )
    ):
        return False
    width = graph.stated_shape(past_key)[-1]
    if not isinstance(width, int) or width < 1 or width % layout.ROWS:
        return False
    if rotated and 2 * graph.shape(cosines)[1] != width:
        return False
    gains: list[str] = []
    epsilon = 1e-5
    if key or value:
        found = _normed_heads(graph, query, key, value, [heads * width, *[kv_heads * width] * 2])
        if found is None:
            return False
        query, gains, epsilon = found
    graph.remove(node)
    rotation = [cosines, sines] if rotated else ["", ""]
    graph.put(
        "Attention", node.name, [query, past_key, past_value, lengths, *rotation, *gains],
        list(node.output[:3]), heads=heads, kv_heads=kv_heads,
        window=max(window, 0), scale=options.get("scale", 0.0), epsilon=epsilon,
    )  # fmt: skip
    return True


def _normed_heads(
    graph: Draft, query: str, key: str, value: str, widths: list[int]
) -> tuple[str, list[str], float] | None:
    """Queries, keys and values in one tensor, and the gains and epsilon of the norms of the first.

    Each is [batch, new, ...] of a part of one tensor [rows, ...], the first two normed on the way.
    """
    parts: list[str] = []
    norms: list[NodeProto] = []
    shapes: set[str] = set()
    for tensor in (query, key, value):
        batched = graph.producer(tensor, "Reshape")
        if batched is None:
            return None
        shapes.add(batched.input[1])
        part, norm = batched.input[0], graph.producer(batched.input[0], *_NORMS)
        if norm is not None:
            norms.append(norm)
            by_head = graph.producer(norm.input[0], "Reshape")
            part = norm.input[0] if by_head is None else by_head.input[0]
        parts.append(part)
    split = graph.producer(parts[2], "Split")
    epsilons = {attributes(norm).get("epsilon", 1e-5) for norm in norms}
    if (
        split is None
        or list(split.output) != parts
        or len(split.input) < 2
        or graph.values(split.input[1]) != widths
        or attributes(split).get("axis", 0) != -1
        or len(norms) != 2
        or len(epsilons) != 1
        or len(shapes) != 1
        or not all(_keeps_columns(graph, shape) for shape in shapes)
        or not all(map(_is_of_rows, norms))
        or not all(graph.has(norm.input[1]) for norm in norms)
        or not _stretches(graph, norms, widths)
    ):
        return None
    together = f"{split.name}/batched"
    graph.put("Reshape", together, [split.input[0], shapes.pop()], [together], domain="")
    return together, [norm.input[1] for norm in norms], epsilons.pop()


def _keeps_columns(graph: Draft, shape: str) -> bool:
    """Whether a Reshape to it gives the last dimension what the others leave."""
    joined = graph.producer(shape, "Concat")
    sizes = graph.values(shape if joined is None else joined.input[-1])
    return sizes is not None and sizes[-1:] == [-1]


def _is_of_rows(norm: NodeProto) -> bool:
    return attributes(norm).get("axis", -1) == -1 and not any(norm.output[1:])


def _stretches(graph: Draft, norms: list[NodeProto], widths: list[int]) -> bool:
    """Whether a norm without a Reshape before it is of all heads, one with it as its gain says."""
    for norm, width in zip(norms, widths, strict=False):
        gain, by_head = graph.shape(norm.input[1]), graph.producer(norm.input[0], "Reshape")
        stretch = [width] if by_head is None else (graph.values(by_head.input[1]) or [])[1:]
        if gain != tuple(stretch) or width % gain[0]:
            return False
    return True
