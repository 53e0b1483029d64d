"""Which nodes can bear a treatment: measured on the graph's own output, one node at a time.

All candidates sit in one graph, each as an `If` between the node as it was and its stand-in, so a
trial of any subset is one run and no reload. Few nodes matter, and they are found by halving: a
group whose joint error is negligible is not looked into.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from onnx import NodeProto, TensorProto, helper

from leangen import calibrate
from leangen.calibrate import Feeds
from leangen.graph_edit import Array, Graph
from leangen.treatments import Treated

Distance = Callable[[Sequence[Array], Sequence[Array]], float]
"""How far outputs are from the reference's: a squared error, which adds up over small causes."""


class Probe:
    """A graph in which each candidate's treatment can be switched on at run time."""

    def __init__(
        self,
        graph: Graph,
        candidates: Mapping[str, Treated],
        feeds: Sequence[Feeds],
        distance: Distance = calibrate.relative_error,
    ) -> None:
        """`candidates` are stand-ins by node name; `feeds` come from `calibrate.record`."""
        self._distance = distance
        self._flags = {name: f"probe/{name}" for name in candidates}
        self._feeds = feeds
        model = graph.proto()
        del model.graph.node[:]
        for node in graph.nodes:
            if node.name in candidates:
                node = _switch(self._flags[node.name], node, candidates[node.name].nodes)
            model.graph.node.append(node)
        for flag in self._flags.values():
            model.graph.input.append(helper.make_tensor_value_info(flag, TensorProto.BOOL, []))
        with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
            path = Path(folder) / "probe.onnx"
            graph.save(path, model)
            self._session = calibrate.open_session(path)
        self._reference = [self._run(feed, frozenset()) for feed in self._feeds]

    def _run(self, feed: Feeds, treated: frozenset[str]) -> list[Array]:
        flags = {flag: np.array(name in treated) for name, flag in self._flags.items()}
        return list(self._session.run(None, {**feed, **flags}))

    def error(self, names: Iterable[str]) -> float:
        """Distance of the outputs with just these nodes treated, over all feeds."""
        return float(np.mean([self._error(names, run) for run in range(len(self._feeds))]))

    def _error(self, names: Iterable[str], run: int) -> float:
        outputs = self._run(self._feeds[run], frozenset(names))
        return self._distance(outputs, self._reference[run])

    def harm(self, names: Sequence[str], negligible: float) -> dict[str, float]:
        """`isolate` on the feed that all the treatments together harm most.

        One feed is enough to put the nodes in order; what they do together, `error` tells.
        """
        worst = max(range(len(self._feeds)), key=lambda run: self._error(names, run))
        return isolate(names, lambda group: self._error(group, worst), negligible)


def isolate(
    names: Sequence[str], error: Callable[[Sequence[str]], float], negligible: float
) -> dict[str, float]:
    """Squared error that each node alone causes, found by halving groups.

    A group with an error of at most `negligible` is taken as one: its nodes share the figure.
    Squared errors of small disturbances add up, so the second half of a group is what the first
    leaves, unless that would be a small difference of large figures.
    """
    found: dict[str, float] = {}

    def split(group: Sequence[str], joint: float) -> None:
        if len(group) == 1 or joint <= negligible:
            found.update(dict.fromkeys(group, joint / len(group)))
            return
        first, second = group[: len(group) // 2], group[len(group) // 2 :]
        left = error(first)
        right = joint - left if left <= 0.7 * joint else error(second)
        split(first, left)
        split(second, right)

    if names:
        split(names, error(names))
    return found


def _switch(flag: str, node: NodeProto, stand_in: Sequence[NodeProto]) -> NodeProto:
    """`If(flag) { stand_in } else { node }`, with tensor names of their own inside."""
    branches = {}
    for branch, nodes in (("then_branch", stand_in), ("else_branch", [node])):
        made = {output for inner in nodes for output in inner.output}
        copies = []
        for inner in nodes:
            copy = NodeProto()
            copy.CopyFrom(inner)
            copy.name = f"{branch}/{inner.name}"
            for field in (copy.input, copy.output):
                for index, name in enumerate(field):
                    if name in made:
                        field[index] = f"{branch}/{name}"
            copies.append(copy)
        outputs = [
            helper.make_tensor_value_info(f"{branch}/{name}", TensorProto.FLOAT, None)
            for name in node.output
        ]
        branches[branch] = helper.make_graph(copies, branch, [], outputs)
    return helper.make_node("If", [flag], list(node.output), node.name, **branches)
