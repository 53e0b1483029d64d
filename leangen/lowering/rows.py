"""Keeps a decoder's tensors [batch, new, width] all the way, where a graph flattens the rows.

ORT's Gemm works on matrices, so `exporters/llm_graph.py` computes on [batch * new, width] and
reshapes around every attention. `Linear` takes rows of any shape: once no Gemm is left, the tokens
need not be flattened, and two nodes a layer go. Nothing changes unless all of it can.
"""

from __future__ import annotations

from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering.draft import Draft

NORMS = ("SimplifiedLayerNormalization", "RMSNormalization", "LayerNormalization")
_ROWWISE = (
    *("Linear", "MatMulNBits", "Add", "Mul", "Div", "Concat", "Split", *NORMS),
    *("QuickGelu", "Gelu", "Relu", "Sigmoid", "Tanh"),
)
"""Operators that treat each row alike, as long as they look at the last axis only."""


def keep_batched(graph: Draft) -> None:
    """Remove the reshapes between [batch, new, width] and [batch * new, width]."""
    flat_ids = [node for node in graph.all("Reshape") if _flattens_ids(graph, node)]
    if len(flat_ids) != 1:
        return
    ids = flat_ids[0].input[0]
    reshapes = [flat_ids[0]]
    # Tensors that will have a dimension more: whether their rows are those of [batch, new].
    changed = {node.output[0]: True for node in graph.consumers(flat_ids[0].output[0])}
    for node in graph.sorted():
        if node.op_type == "Reshape" and _flattens(graph, node, changed):
            reshapes.append(node)
            changed[node.output[0]] = _is_attended(graph, node.input[0])
        elif rows := {tensor for tensor in node.input if tensor in changed}:
            whole = all(changed[tensor] for tensor in rows)
            if node.op_type == "Reshape" and _unflattens(graph, node, ids, whole):
                reshapes.append(node)
            elif node.op_type in _ROWWISE and _on_rows(graph, node, changed):
                changed |= dict.fromkeys(node.output, whole)
            else:
                return
    if not any(graph.is_output(tensor) for tensor in changed):
        for node in reshapes:
            graph.bypass(node)


def _flattens_ids(graph: Draft, node: NodeProto) -> bool:
    """Whether a Reshape makes one row of token ids [batch, new] that only embeddings read."""
    return (
        graph.is_input(node.input[0])
        and len(graph.stated_shape(node.input[0])) == 2
        and graph.values(node.input[1]) == [-1]
        and all(
            reader.op_type in ("Gather", "GatherBlockQuantized")
            and reader.input[1] == node.output[0]
            and attributes(reader).get("axis", attributes(reader).get("gather_axis", 0)) == 0
            and len(graph.shape(reader.input[0])) == 2
            for reader in graph.consumers(node.output[0])
        )
    )


def _flattens(graph: Draft, node: NodeProto, changed: dict[str, bool]) -> bool:
    """Whether a Reshape makes [rows, width] of [batch, ..., width]."""
    width = _width(graph, node.input[0])
    shape = graph.values(node.input[1])
    return node.input[0] not in changed and width is not None and shape == [-1, width]


def _unflattens(graph: Draft, node: NodeProto, ids: str, whole: bool) -> bool:
    """Whether a Reshape makes [batch, new, width] or [batch, ..., width] of [rows, width]."""
    target = graph.producer(node.input[1], "Concat")
    if target is None or len(target.input) != 2:
        return False
    head, tail = graph.producer(target.input[0], "Shape"), graph.values(target.input[1])
    if head is None or head.input[0] != ids:
        return False
    if attributes(head) == {"end": 1}:
        return tail == [-1, _width(graph, node.input[0])]
    return attributes(head) == {} and tail == [-1] and whole


def _on_rows(graph: Draft, node: NodeProto, changed: dict[str, bool]) -> bool:
    """Whether a node works along the last axis, on tensors that all change, and on constants."""
    return attributes(node).get("axis", -1) == -1 and all(
        tensor in changed or not tensor or graph.has(tensor) for tensor in node.input
    )


def _is_attended(graph: Draft, tensor: str) -> bool:
    return graph.producer(tensor, "Attention", "GroupQueryAttention") is not None


def _width(graph: Draft, tensor: str) -> int | None:
    """The last dimension of what attention or a `Linear` makes, or what keeps it; or None."""
    node = graph.producer(tensor, "Attention", "Linear", "Slice", "Reshape", "Add", *NORMS)
    if node is None:
        return None
    options = attributes(node)
    if node.op_type == "Attention":
        return int(options["heads"]) * int(graph.stated_shape(node.input[1])[-1])
    if node.op_type == "Linear":
        return int(options["n"]) // (2 if options["gated"] else 1)
    if node.op_type == "Slice" and graph.values(node.input[3]) != [1]:
        return None
    if node.op_type == "Add":  # the last operand first: a residual is the sum of all before
        return next(filter(None, (_width(graph, term) for term in node.input[::-1])), None)
    return _width(graph, node.input[0])
