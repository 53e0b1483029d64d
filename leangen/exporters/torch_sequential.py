"""Inverting masked autoregressive layers one degree at a time instead of in D full passes.

Value i of x is known once those before it are, and through the masks each hidden unit depends on a
few values only. So step s computes the units that became computable (those whose inputs are all
known), the parameters of the values of group s, and these values. Over all steps each unit is
computed once. The order is read off the zeros of the weights, so that it holds for any network of
masked layers, element-wise functions and residual sums (Germain et al., MADE, arXiv:1502.03509).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from leangen.errors import UnsupportedError
from leangen.exporters.torch_emitter import Array, values
from leangen.exporters.torch_trace import Constant, Op, Trace, Value, trace


@dataclass(frozen=True, slots=True)
class Masked:
    """A masked autoregressive layer."""

    owner: nn.Module
    """The layer, which has the weights."""
    network: Callable[[Tensor], Tensor]
    """Values [n, d] to parameters [n, d * per_feature], those of a feature side by side."""
    per_feature: int
    invert: Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
    """(y [n, g], parameters [n, g * per_feature]) to x [n, g] and log-determinant [n], for any g
    of the features."""


_LAYERS: dict[int, Masked] = {}
_LIBRARY = torch.library.Library("leangen", "DEF")
_LIBRARY.define("sequential(Tensor y, int layer) -> (Tensor, Tensor)")


def _shapes_only(y: Tensor, layer: int) -> tuple[Tensor, Tensor]:
    """Stands in while tracing: no value of it is kept."""
    return torch.zeros_like(y), y.new_zeros(len(y))


_LIBRARY.impl("sequential", _shapes_only, "CompositeExplicitAutograd")


def sequential(y: Tensor, layer: Masked) -> tuple[Tensor, Tensor]:
    """x [n, d] and the log-determinants [n] of an inversion, recorded as one operator."""
    _LAYERS[id(layer.owner)] = layer
    made: tuple[Tensor, Tensor] = torch.ops.leangen.sequential(y, id(layer.owner))
    return made


def layer_of(op: Op) -> Masked:
    """The layer that a recorded `sequential` inverts."""
    return _LAYERS[op.arguments["layer"]]


Schedule: TypeAlias = Array
"""int64 [steps, width]: which units of a tensor [n, units] are computed in which step.

Where a step has fewer, another unit stands in. Nothing reads its value before its own step, which
writes it again, so that it does no harm.
"""


@dataclass(frozen=True, slots=True)
class Plan:
    """How a layer is inverted."""

    network: Trace
    features: Schedule
    parameters: Schedule
    units: dict[int, Schedule]
    """By the index of the network's value, all but the input and the parameters."""
    univariate: Trace


ELEMENTWISE = frozenset(
    (
        *("relu", "tanh", "sigmoid", "elu", "celu", "leaky_relu", "silu", "gelu", "mish"),
        *("softplus", "hardtanh", "sin", "cos", "exp", "clone", "detach"),
        *("add", "sub", "mul", "div", "rsub", "native_batch_norm"),
    )
)
LINEAR = frozenset(("addmm", "mm"))


def plan(layer: Masked, features: int) -> Plan:
    """Read the order of a layer off its weights; UnsupportedError where there is none."""
    network = trace(layer.network, [torch.zeros(1, features)], layer.owner)
    source, target = network.inputs[0], network.outputs[0]
    if not isinstance(target, Value):
        raise UnsupportedError("a masked network ignores its input: nothing is autoregressive")
    classes = _aligned(network)
    depends = _dependencies(network, features)[target.index]
    per_feature = depends.reshape(features, layer.per_feature, features)
    groups = _groups(np.logical_or.reduce(per_feature, axis=1))
    steps = int(groups.max()) + 1
    ready = _ready(network, classes, groups)
    needed = ready[classes[target.index]].reshape(features, -1).max(1)
    if (needed > groups).any():
        raise UnsupportedError("the units of a masked network cannot be put into an order")
    by_class = {
        root: _schedule(when, steps)
        for root, when in ready.items()
        if root not in (classes[source.index], classes[target.index])
    }
    order = _schedule(groups, steps)
    group = order.shape[1]
    parameters = order[..., None] * layer.per_feature + np.arange(layer.per_feature)
    univariate = trace(
        layer.invert,
        [torch.zeros(1, group), torch.zeros(1, group * layer.per_feature)],
        layer.owner,
    )
    return Plan(
        network,
        order,
        parameters.reshape(steps, -1),
        {index: by_class[root] for index, root in classes.items() if root in by_class},
        univariate,
    )


def operands(op: Op) -> list[Value]:
    """The values that an operator of the network reads."""
    return values(op.arguments)


def weight_of(op: Op) -> Constant:
    """The weight [k, n] of a linear operator of the network."""
    weight: Any = op.arguments["mat2"]
    if not isinstance(weight, Constant):
        raise UnsupportedError(f"{op.where}: a product of two computed tensors in a masked network")
    return weight


def _aligned(network: Trace) -> dict[int, int]:
    """A class for each value: those that element-wise operators tie unit by unit have one."""
    root = {network.inputs[0].index: network.inputs[0].index}
    for op in network.ops:
        made = op.outputs[0]
        if made is None:
            continue
        root[made.index] = made.index
        if op.name in ELEMENTWISE:
            tied = {root[value.index] for value in operands(op)} | {made.index}
            if root[network.inputs[0].index] in tied:
                raise UnsupportedError(
                    f"{op.where}: aten.{op.name} is applied to the input of a masked network "
                    "itself: expected a masked linear layer first"
                )
            first = min(tied)
            root = {index: first if old in tied else old for index, old in root.items()}
        elif op.name not in LINEAR:
            raise UnsupportedError(
                f"{op.where}: aten.{op.name} in a masked network: expected linear layers, "
                "element-wise functions and sums"
            )
    return root


def _dependencies(network: Trace, features: int) -> dict[int, Array]:
    """By value: bool [units, features], the features that each unit depends on."""
    found: dict[int, Array] = {network.inputs[0].index: np.eye(features, dtype=bool)}
    for op in network.ops:
        made = op.outputs[0]
        if made is None:
            continue
        parts = [found[value.index] for value in operands(op)]
        if op.name in LINEAR:
            used = weight_of(op).tensor.detach().numpy() != 0
            found[made.index] = (used.T.astype(np.float32) @ parts[0].astype(np.float32)) > 0
        else:
            found[made.index] = np.logical_or.reduce(parts)
    return found


def _groups(depends: Array) -> Array:
    """The step of each feature: after all those that it depends on.

    Steps have the same number of features: where they would not, there is one feature in each.
    """
    features = len(depends)
    groups, left, rank = np.full(features, -1), depends.sum(1), 0
    while (groups < 0).any():
        now = np.flatnonzero((groups < 0) & (left == 0))
        if not now.size:
            raise UnsupportedError("a masked network is not autoregressive: features form a circle")
        groups[now] = rank
        left = left - depends[:, now].sum(1)
        rank += 1
    if len(set(np.bincount(groups).tolist())) > 1:
        groups[np.argsort(groups, kind="stable")] = np.arange(features)
    return groups


def _ready(network: Trace, classes: dict[int, int], groups: Array) -> dict[int, Array]:
    """By class: the first step at whose start each unit can be computed."""
    source = classes[network.inputs[0].index]
    ready: dict[int, Array] = {source: groups + 1}
    changed = True
    while changed:
        changed = False
        for op in network.ops:
            made = op.outputs[0]
            if made is None or op.name not in LINEAR:
                continue
            before = ready[classes[operands(op)[0].index]]
            used = weight_of(op).tensor.detach().numpy() != 0
            new = np.where(used, before[:, None], 0).max(0)
            root = classes[made.index]
            if root not in ready or (new > ready[root]).any():
                ready[root] = np.maximum(new, ready.get(root, 0))
                changed = True
    return ready


def _schedule(when: Array, steps: int) -> Schedule:
    """Units by step; those that become computable after the last one are never needed."""
    lists = [np.flatnonzero(when == step) for step in range(steps)]
    width = max(1, *(len(units) for units in lists))
    rows = np.zeros((steps, width), np.int64)
    for row, units in zip(rows, lists, strict=True):
        row[: len(units)] = units
    return rows
