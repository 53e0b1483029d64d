"""`PixelAttention` in place of attention between an image's pixels, channels first.

The pattern is the one that torch exports for q, k, v in the thirds of a convolution's channels:
both q and k scaled, heads brought to the batch, and two Einsum around a softmax.
"""

from __future__ import annotations

from typing import cast

from onnx import NodeProto

from leangen.graph_edit import attributes
from leangen.lowering.draft import DOMAIN, Draft, either_way
from leangen.lowering.shapes import Shapes


def rewrite(graph: Draft) -> int:
    """Replace attention whose q, k and v an own `Conv` makes."""
    products = [node for node in graph.all("Einsum") if _equation(node) == "bts,bcs->bct"]
    if not products or not any(node.domain == DOMAIN for node in graph.all("Conv")):
        return 0
    shapes = Shapes(graph)
    return sum(_replace(graph, node, shapes) for node in products)


def _equation(node: NodeProto) -> str:
    return bytes(attributes(node)["equation"]).decode().replace(" ", "")


def _replace(graph: Draft, product: NodeProto, shapes: Shapes) -> bool:
    softmax = graph.producer(product.input[0], "Softmax")
    scores = None if softmax is None else graph.producer(softmax.input[0], "Einsum")
    if softmax is None or scores is None or _equation(scores) != "bct,bcs->bts":
        return False
    if attributes(softmax).get("axis", -1) not in (-1, 2):
        return False
    query, key = (_scaled(graph, name) for name in scores.input)
    value = graph.producer(product.input[1], "Reshape")
    if query is None or key is None or value is None:
        return False
    split = graph.producer(value.input[0], "Split")
    if split is None or attributes(split).get("axis") != 1 or len(split.input) > 1:
        return False
    if list(split.output) != [query[0], key[0], value.input[0]]:
        return False
    flat = graph.producer(split.input[0], "Reshape")
    merged = graph.only_reader(product.output[0], "Reshape")
    image = None if merged is None else graph.only_reader(merged.output[0], "Reshape")
    if flat is None or merged is None or image is None:
        return False
    qkv, y = shapes.dims(flat.input[0]), shapes.dims(image.output[0])
    head = shapes.dims(product.input[1])
    if len(qkv) != 4 or len(y) != 4 or len(head) != 3 or y[2:] != qkv[2:]:
        return False
    if not all(isinstance(size, int) and size for size in (*qkv[1:], *head[1:])):
        return False
    channels, height, breadth, width, pixels = cast("list[int]", [*qkv[1:], *head[1:]])
    # The key's pixels need not be known: it has as many elements as the query, in as many heads.
    last = [shapes.dims(name)[-1:] for name in (flat.output[0], scores.input[0], merged.output[0])]
    if pixels != height * breadth or last != 3 * [[pixels]] or channels % (3 * width):
        return False
    if any(shapes.dims(name)[1:2] != [width] for name in scores.input):
        return False
    scale = query[1] * key[1]
    if scale <= 0:
        return False
    graph.remove(image)
    graph.put(
        "PixelAttention", product.name, [flat.input[0]], [image.output[0]],
        heads=channels // (3 * width), scale=scale,
    )  # fmt: skip
    return True


def _scaled(graph: Draft, tensor: str) -> tuple[str, float] | None:
    """Reshape(x * constant): x and the constant."""
    reshape = graph.producer(tensor, "Reshape")
    product = None if reshape is None else graph.producer(reshape.input[0], "Mul")
    if product is None:
        return None
    for x, name in either_way(product):
        values = graph.values(name)
        if values is not None and len(values) == 1:
            return x, float(values[0])
    return None
