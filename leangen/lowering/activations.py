"""The form of a graph whose low-bit linear layers do not round activations."""

from __future__ import annotations

from onnx import ModelProto

from leangen.lowering.draft import set_option


def use_fp32(model: ModelProto) -> None:
    """Let every MatMulNBits and Linear of a model take fp32 activations, in place.

    ORT's own switch, `mlas.qnbit.force_fp32`, reaches 4-bit weights in blocks of 32 only.
    """
    for node in model.graph.node:
        if node.op_type == "MatMulNBits":
            set_option(node, "accuracy_level", 1)
        elif node.op_type in ("Linear", "CudaLinear"):
            set_option(node, "activations", "fp32")
