"""Writes the inversion of a masked autoregressive layer as an ONNX `Scan` over its steps.

The loop carries what is known so far: the features and the inputs of each linear layer, zero where
not yet known. Their order is the network's own, so that sums round as they do in the other
direction. The columns of a weight are put into the order of the steps before the loop, from the
[k, n] constant that the other direction multiplies with: quantization finds it there under the same
name. Each step reads its own part.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from onnx import NodeProto, TensorProto, helper

from leangen.exporters.torch_emitter import Array, Emitter, Writer, conversions, registry
from leangen.exporters.torch_sequential import (
    ELEMENTWISE,
    LINEAR,
    Plan,
    Schedule,
    layer_of,
    operands,
    plan,
    weight_of,
)
from leangen.exporters.torch_trace import Batch, Constant, Op, Size, Value

CONVERSIONS, aten = registry()


@aten("leangen.sequential")
def _sequential(e: Emitter, a: Any, op: Op) -> list[str]:
    y = a["y"]
    layer = layer_of(op)
    return _Scan(e, plan(layer, int(y.shape[1])), e.name(y)).write()


class _Body:
    """The nodes of a loop's body; its constants stand in the graph around it."""

    def __init__(self, outer: Writer) -> None:
        self.nodes: list[NodeProto] = []
        self._outer = outer

    def node(self, op: str, name: str, inputs: Sequence[str], **attributes: Any) -> str:
        outputs = attributes.pop("outputs", [f"{name}/y"])
        self.nodes.append(helper.make_node(op, list(inputs), outputs, name=name, **attributes))
        return str(outputs[0])

    def constant(self, name: str, array: Array) -> str:
        return self._outer.constant(name, array)


class _Scan:
    """One loop being written."""

    def __init__(self, e: Emitter, how: Plan, y: str) -> None:
        self.e, self.how = e, how
        self.scope = e.scope("scan")
        self.body = _Body(e.writer)
        self.inner = Emitter(self.body, e.batch_of, scope=self.scope)
        self._y = y
        self._before: dict[str, str] = {}  # initial value of each state of the loop
        self._after: dict[str, str] = {}  # and what a step makes of it
        self._slices: dict[str, str] = {}  # name inside: tensor of all steps
        self._blocks: dict[int, str] = {}  # what this step computed, by value
        self._known: dict[int, str] = {}  # rows known so far, by value

    def write(self) -> list[str]:
        """The names of x [n, d] and of the log-determinants [n]."""
        e, inner, how = self.e, self.inner, self.how
        rows = e.op("Transpose", self._y, perm=[1, 0])
        y = self._slice("y", self._in_order(rows, how.features, Batch(1)))
        known = self._state("x", [how.features.size, Batch(1)])
        total = self._state("log_det", [Batch(1)])
        self._known[how.network.inputs[0].index] = known
        for op in how.network.ops:
            self._compute(op)
        target = how.network.outputs[0]
        assert isinstance(target, Value)  # checked by plan
        turned = [
            inner.op("Transpose", block, perm=[1, 0]) for block in (y, self._blocks[target.index])
        ]
        x, log_det = inner.emit(how.univariate, turned)
        self._append("x", known, how.features, inner.op("Transpose", x, perm=[1, 0]))
        self._after["log_det"] = inner.op("Add", total, log_det)
        found, sums = self._close()[:2]
        return [e.op("Transpose", found, perm=[1, 0]), sums]

    def _in_order(self, x: str, schedule: Schedule, *rest: Size) -> str:
        """Rows of a tensor by step: [steps, width, ...]."""
        picked = self.e.op("Gather", x, self.e.const(schedule.reshape(-1)), axis=0)
        return self.e.op("Reshape", picked, self.e.shape([*schedule.shape, *rest]))

    def _compute(self, op: Op) -> None:
        """This step's units of what an operator of the network makes."""
        made = op.outputs[0]
        if made is None:
            return
        name, inner = f"v{made.index}", self.inner
        schedule = self._schedule(made)
        if op.name in LINEAR:
            read = operands(op)[0]
            weight = self._weight(name, op, schedule)
            block = inner.op("MatMul", weight, self._rows(read))
            bias = op.arguments.get("self")
            if op.name == "addmm" and isinstance(bias, Constant):
                block = inner.op("Add", block, self._per_unit(f"{name}.bias", bias, schedule))
        elif "batch_norm" in op.name:
            block = self._normalized(name, op, schedule)
        else:
            block = self._elementwise(name, op, schedule)
        self._blocks[made.index] = block

    def _schedule(self, value: Value) -> Schedule:
        if value.index == self.how.network.inputs[0].index:
            return self.how.features
        return self.how.units.get(value.index, self.how.parameters)

    def _rows(self, value: Value) -> str:
        """All rows of a value as far as they are known in this step."""
        if value.index not in self._known:
            name, units = f"v{value.index}", value.shape[1]
            before, block = self._state(name, [units, Batch(1)]), self._blocks[value.index]
            self._known[value.index] = self._append(name, before, self._schedule(value), block)
        return self._known[value.index]

    def _weight(self, name: str, op: Op, schedule: Schedule) -> str:
        """This step's part of a weight, [width, k]."""
        e, weight = self.e, weight_of(op)
        stored = e.weight(weight)
        order = e.const(schedule.reshape(-1))
        picked = e.labelled("Gather", f"{stored}/MatMul", stored, order, axis=1)
        turned = e.op("Transpose", picked, perm=[1, 0])
        shape = e.const([*schedule.shape, len(weight.tensor)])
        return self._slice(f"{name}.weight", e.op("Reshape", turned, shape))

    def _per_unit(self, name: str, constant: Constant, schedule: Schedule) -> str:
        """This step's numbers of a constant [units] (or [1, units], or a single one)."""
        numbers = constant.tensor.detach().float().reshape(-1).numpy()
        if len(numbers) == 1:
            return self.e.const(numbers, np.float32)
        return self._slice(name, self.e.const(numbers[schedule][..., None], np.float32))

    def _elementwise(self, name: str, op: Op, schedule: Schedule) -> str:
        assert op.name in ELEMENTWISE  # checked by plan
        inputs = {}
        for key, argument in op.arguments.items():
            if isinstance(argument, Value):
                inputs[key] = argument
                self.inner.bind(argument, self._blocks[argument.index])
            elif isinstance(argument, Constant):
                stand_in = Value(-1 - len(inputs), argument.shape, torch.float32)
                self.inner.bind(stand_in, self._per_unit(f"{name}.{key}", argument, schedule))
                inputs[key] = stand_in
        made = conversions()[op.name](self.inner, {**op.arguments, **inputs}, op)
        return made if isinstance(made, str) else made[0]

    def _normalized(self, name: str, op: Op, schedule: Schedule) -> str:
        a = op.arguments
        spread = a["running_var"].tensor.double() + a["eps"]
        ones = torch.ones_like(spread)
        scale = (ones if a["weight"] is None else a["weight"].tensor.detach()) / spread.sqrt()
        shift = -a["running_mean"].tensor * scale
        shift = shift if a["bias"] is None else shift + a["bias"].tensor.detach()
        factors = [
            self._per_unit(f"{name}.{kind}", Constant(t), schedule)
            for kind, t in (("scale", scale), ("shift", shift))
        ]
        block = self._blocks[a["input"].index]
        return self.inner.op("Add", self.inner.op("Mul", block, factors[0]), factors[1])

    # The loop's own inputs and outputs

    def _slice(self, name: str, of_all_steps: str) -> str:
        name = f"{self.scope}/{name}"
        self._slices[name] = of_all_steps
        return name

    def _state(self, name: str, shape: Sequence[Size]) -> str:
        """What a state of the loop, at first zero, is when a step begins."""
        zeros = self.e.op("Expand", self.e.const(0.0, np.float32), self.e.shape(shape))
        self._before[name] = zeros
        return f"{self.scope}/{name}.before"

    def _append(self, name: str, before: str, schedule: Schedule, block: str) -> str:
        """Write this step's rows among the known ones."""
        index = self._slice(f"{name}.places", self.e.const(schedule[..., None]))
        self._after[name] = self.inner.op("ScatterND", before, index, block)
        return self._after[name]

    def _close(self) -> list[str]:
        """End the loop; what each state is after the last step."""
        inside = [f"{self.scope}/{name}.before" for name in self._before]
        integer = {name for name in self._slices if name.endswith(".places")}
        inputs = [
            helper.make_tensor_value_info(
                name, TensorProto.INT64 if name in integer else TensorProto.FLOAT, None
            )
            for name in (*inside, *self._slices)
        ]
        ends = [self._after[name] for name in self._before]
        outputs = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in ends]
        body = helper.make_graph(self.body.nodes, f"{self.scope}/step", inputs, outputs)
        return self.e.several(
            "Scan",
            len(ends),
            *self._before.values(),
            *self._slices.values(),
            body=body,
            num_scan_inputs=len(self._slices),
        )
