"""A graph being lowered: who makes a tensor, who reads it, and nodes put in place of others.

A rule finds a pattern from its last node back, removes the nodes that the new one replaces and adds
the new one under the name of the pattern's output. Order does not matter while rules work:
`finish` sorts the nodes and drops those that nothing needs any more (a rule that counts readers
calls `prune` first).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import NodeProto, helper

from leangen.graph_edit import Graph, attributes, tensor_names

DOMAIN = "leangen"


class Draft(Graph):
    """A graph with an index of producers and consumers. Constants as in `Graph`."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self._live: dict[int, NodeProto] = {}
        self._producers: dict[str, NodeProto] = {}
        self._consumers: dict[str, list[NodeProto]] = defaultdict(list)
        self._outputs = {value.name: value for value in self.model.graph.output}
        self._inputs = {value.name: value for value in self.model.graph.input}
        for node in self.nodes:
            self.add_node(node)

    def all(self, *op_types: str) -> list[NodeProto]:
        """The nodes of these operators; safe to remove and add while walking."""
        return [node for node in self._live.values() if node.op_type in op_types]

    def producer(self, tensor: str, *op_types: str) -> NodeProto | None:
        """The node that makes a tensor, if it is one of these operators (any when none given)."""
        node = self._producers.get(tensor)
        return node if node is not None and (not op_types or node.op_type in op_types) else None

    def consumers(self, tensor: str) -> list[NodeProto]:
        """The nodes that read a tensor; a control-flow node reads what its subgraphs read."""
        return list(self._consumers[tensor])

    def only_reader(self, tensor: str, *op_types: str) -> NodeProto | None:
        """The one node that reads a tensor, if nothing else does and it is one of these."""
        readers = self._consumers[tensor]
        if len(readers) != 1 or tensor in self._outputs:
            return None
        return readers[0] if not op_types or readers[0].op_type in op_types else None

    def is_input(self, tensor: str) -> bool:
        """Whether a tensor is an input of the graph."""
        return tensor in self._inputs

    def stated_shape(self, tensor: str) -> list[int | str]:
        """The shape of an input or output of the graph: sizes, or names of those that vary."""
        value = self._inputs.get(tensor) or self._outputs[tensor]
        dims = value.type.tensor_type.shape.dim
        return [dim.dim_param or int(dim.dim_value) for dim in dims]

    def is_output(self, tensor: str) -> bool:
        """Whether a tensor is an output of the graph."""
        return tensor in self._outputs

    def values(self, tensor: str) -> list[Any] | None:
        """A constant's values as a flat list; None when it is not a constant."""
        return np.ravel(self.array(tensor)).tolist() if self.has(tensor) else None

    def remove(self, *nodes: NodeProto) -> None:
        """Take nodes out; what they made is then free to be made by another."""
        for node in nodes:
            del self._live[id(node)]
            for tensor in node.output:
                self._producers.pop(tensor, None)
            for tensor in dict.fromkeys(tensor_names([node])):
                self._consumers[tensor] = [n for n in self._consumers[tensor] if n is not node]

    def add_node(self, node: NodeProto) -> None:
        """Add a node, or one that was removed and has been changed since."""
        self._live[id(node)] = node
        for tensor in filter(None, node.output):
            self._producers[tensor] = node
        for tensor in dict.fromkeys(tensor_names([node])):
            self._consumers[tensor].append(node)

    def put(
        self,
        op_type: str,
        name: str,
        inputs: Sequence[str],
        outputs: Sequence[str],
        *,
        domain: str = DOMAIN,
        **options: Any,
    ) -> None:
        """Add a new node, one of leangen's own operators unless another domain is given."""
        self.add_node(
            helper.make_node(op_type, list(inputs), list(outputs), name, domain=domain, **options)
        )

    def bypass(self, node: NodeProto) -> None:
        """Take out a node that hands its first input on; its readers read that input instead.

        Where the node makes an output of the graph, what made the input makes that.
        """
        source, target = node.input[0], node.output[0]
        self.remove(node)
        maker = self.producer(source) if target in self._outputs else None
        for changed in [maker] if maker is not None else self.consumers(target):
            old, new = (source, target) if changed is maker else (target, source)
            self.remove(changed)
            for names in (changed.input, changed.output):
                for index, name in enumerate(names):
                    if name == old:
                        names[index] = new
            self.add_node(changed)

    def prune(self) -> None:
        """Remove nodes that nothing needs, such as what fed a pattern that is gone."""
        needed = set(self._outputs)
        for node in reversed(self.sorted()):
            if needed.intersection(node.output):
                needed.update(tensor_names([node]))
            else:
                self.remove(node)

    def finish(self) -> None:
        """Make the rules' changes the graph's: nodes in order, leangen's domain declared."""
        self.prune()
        self.nodes = self.sorted()
        self.require(DOMAIN)

    def sorted(self) -> list[NodeProto]:
        """Every node after those whose tensors it reads; else in the order they were added."""
        done: set[int] = set()
        order: list[NodeProto] = []
        stack = list(reversed(self._live.values()))
        while stack:
            node = stack[-1]
            waits_for = [
                maker
                for tensor in tensor_names([node])
                if (maker := self._producers.get(tensor)) is not None
                and id(maker) not in done
                and maker is not node
            ]
            if id(node) in done or not waits_for:
                stack.pop()
                if id(node) not in done:
                    done.add(id(node))
                    order.append(node)
            else:
                stack += waits_for
        return order


def options_are(node: NodeProto, **expected: Any) -> bool:
    """Whether a node's attributes are these and no others: a pattern must not drop one it ignores.

    A tuple stands for alternatives; an attribute that the node lacks is taken as the first of them.
    """
    given = attributes(node)
    if set(given) - set(expected):
        return False
    for name, allowed in expected.items():
        choices = allowed if isinstance(allowed, tuple) else (allowed,)
        if given.get(name, choices[0]) not in choices:
            return False
    return True


def either_way(node: NodeProto) -> tuple[tuple[str, str], tuple[str, str]]:
    """The two inputs of an operator that may have them in either order, both ways round."""
    first, second = node.input
    return (first, second), (second, first)


def set_option(node: NodeProto, name: str, value: Any) -> None:
    """Give a node's attribute another value."""
    kept = [attribute for attribute in node.attribute if attribute.name != name]
    del node.attribute[:]
    node.attribute.extend([*kept, helper.make_attribute(name, value)])
