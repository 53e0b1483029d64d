"""What a lint rule is, and what rules share: who makes and who reads a tensor, quantized pairs.

A rule finds patterns of nodes that ONNX Runtime runs slowly or wrongly on a CPU, and may mend them
in place. `fix` must remove the hit that it is given, so that fixing ends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx import NodeProto, helper

from leangen.graph_edit import Graph, attributes, tensor_names

MICROSOFT = "com.microsoft"


@dataclass(frozen=True, slots=True)
class Hit:
    """One place where a rule applies."""

    nodes: tuple[NodeProto, ...]
    """The pattern; the first node names it. Empty for the graph as a whole."""
    what: str
    fixable: bool = True


@dataclass(frozen=True, slots=True)
class Rule:
    """A trap."""

    name: str
    why: str
    """What it costs, in words."""
    changes: str | None
    """What the fix changes in the output beyond float rounding; None when nothing."""
    find: Callable[[Graph], Iterator[Hit]]
    fix: Callable[[Graph, Hit], None] | None = None
    remedy: str = ""
    """What to do where the rule has no fix."""
    at_opening: bool = False
    """It costs time when the model is opened, not when it runs."""


class Uses:
    """Which node makes a tensor, and which read it."""

    def __init__(self, graph: Graph) -> None:
        self.maker: dict[str, NodeProto] = {}
        self.readers: dict[str, list[NodeProto]] = defaultdict(list)
        for node in graph.nodes:
            for name in node.output:
                self.maker[name] = node
            for name in set(tensor_names([node])):
                self.readers[name].append(node)
        self.outputs = {output.name for output in graph.model.graph.output}

    def made_by(self, tensor: str, *ops: str) -> NodeProto | None:
        """The node that makes a tensor if it is one of `ops`."""
        node = self.maker.get(tensor)
        return node if node is not None and node.op_type in ops else None

    def only_reader(self, tensor: str, *ops: str) -> NodeProto | None:
        """The one node that reads a tensor if it is one of `ops` and no output of the graph."""
        readers = self.readers.get(tensor, [])
        if len(readers) != 1 or tensor in self.outputs or readers[0].op_type not in ops:
            return None
        return readers[0]


def constant(graph: Graph, node: NodeProto, index: int) -> str | None:
    """The name of a node's input if it is there and a constant."""
    name = optional(node, index)
    return name if name and graph.has(name) else None


def optional(node: NodeProto, index: int) -> str:
    """A node's input, or an empty name."""
    return str(node.input[index]) if len(node.input) > index else ""


def option(node: NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    return int(attributes(node).get(name, default))


def make(op: str, inputs: list[str], output: str, **options: Any) -> NodeProto:
    """A node named after what it makes."""
    return helper.make_node(op, inputs, [output], f"{output}/{op}", **options)


def changed(node: NodeProto, inputs: dict[int, str]) -> NodeProto:
    """A copy of a node that reads other tensors."""
    copy = NodeProto()
    copy.CopyFrom(node)
    for index, name in inputs.items():
        copy.input[index] = name
    while copy.input and not copy.input[-1]:
        del copy.input[-1]
    return copy


def saturating(root: Path = Path("/")) -> bool:
    """Whether this CPU multiplies u8 x s8 in a way that can saturate: x86 without VNNI."""
    try:
        info = (root / "proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return False
    flags = next((line.split() for line in info.splitlines() if line.startswith("flags")), [])
    return "avx2" in flags and not {"avx_vnni", "avx512_vnni"} & set(flags)
