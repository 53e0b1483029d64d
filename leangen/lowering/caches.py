"""The forms of a graph that keep keys and values in a half or a quarter of the memory.

The context is read whole for every token. Beside the rounding of activations to 8 bits that of keys
and values to 11, as fp16 does it, does not show (SmolLM2: logits 0.089 rms from those of fp32
either way); int8 has a scale for each position of each head.
"""

from __future__ import annotations

from leangen_kernels.cache_layout import CACHES
from onnx import ModelProto, helper

from leangen.lowering.draft import DOMAIN, set_option

_OURS = ((DOMAIN, "Attention"), (DOMAIN, "CudaAttention"))


def fit(model: ModelProto) -> bool:
    """Whether every attention of a model is leangen's, whose caches may take any form."""
    nodes = model.graph.node
    ours = any((node.domain, node.op_type) in _OURS for node in nodes)
    return ours and all(node.op_type != "GroupQueryAttention" for node in nodes)


def use(model: ModelProto, form: str) -> None:
    """Let leangen's attention, whose caches are fp32, keep them as `fp32`, `fp16` or `int8`."""
    cache = CACHES[form]
    ours = [node for node in model.graph.node if (node.domain, node.op_type) in _OURS]
    held = {name for node in ours for name in (*node.input[1:3], *node.output[1:3])}
    for node in ours:
        set_option(node, "cache", form)
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        if value.name in held:
            kind = value.type.tensor_type
            kind.elem_type = helper.np_dtype_to_tensor_dtype(cache.dtype)
            if kind.shape.dim and kind.shape.dim[-1].HasField("dim_value"):
                kind.shape.dim[-1].dim_value = cache.columns(kind.shape.dim[-1].dim_value)
