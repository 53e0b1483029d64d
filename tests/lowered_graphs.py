"""What stands in a lowered graph."""

import onnx
from onnx import helper

from leangen.lowering.chain import KINDS


def nodes(path):
    """(domain, operator) of every node, the steps of a `Chain` in its place."""
    found = []
    for node in onnx.load(path, load_external_data=False).graph.node:
        steps = [a for a in node.attribute if a.name == "kinds" and node.op_type == "Chain"]
        kinds = helper.get_attribute_value(steps[0]) if steps else ()
        found += [(node.domain, KINDS[kind]) for kind in kinds] or [(node.domain, node.op_type)]
    return found


def operators(path):
    """The operators alone."""
    return [operator for _, operator in nodes(path)]


def forms(path):
    """How the weights of each `Linear` are packed."""
    return [
        helper.get_attribute_value(option).decode()
        for node in onnx.load(path, load_external_data=False).graph.node
        for option in node.attribute
        if option.name == "form" or option.name.startswith("form_")
    ]
