"""Writes the MLPs of a language model, gated or plain, one per layer or one per expert."""

from __future__ import annotations

import numpy as np
from onnx import TensorProto

from leangen.exporters.decoder import DecoderConfig
from leangen.exporters.llm_linear import Linears


class Mlps:
    """Adds a layer's MLP, or its experts, to the graph that `linears` writes to."""

    def __init__(self, config: DecoderConfig, linears: Linears, prefix: str = "") -> None:
        self.config = config
        self.linears = linears
        self.prefix = prefix
        self.writer = linears.writer

    def mlp(self, layer: int, x: str) -> str:
        """The MLP of x [rows, width]."""
        name = f"{self.prefix}layers.{layer}"
        return self._experts(name, x) if self.config.routed(layer) else self._one(name, "mlp", x)

    def _one(self, weights: str, block: str, x: str) -> str:
        path = f"/{weights}/{block}"
        if not self.config.gated:
            up = self.linears.linear(weights, block, x, ["up"])
            return self.linears.linear(weights, block, self._activation(path, up), ["down"])
        both = self.linears.linear(weights, block, x, ["gate", "up"], "_")
        gate, up = f"{path}/gate_half", f"{path}/up_half"
        self.writer.node("Split", f"{path}/split", [both], [gate, up], axis=-1, num_outputs=2)
        gated = self.writer.node("Mul", f"{path}/gated", [self._activation(path, gate), up])
        return self.linears.linear(weights, block, gated, ["down"])

    def _activation(self, path: str, x: str) -> str:
        kind = self.config.activation
        if kind == "silu":  # QuickGelu with alpha 1 is SiLU, in one pass over the data
            return self.writer.microsoft("QuickGelu", f"{path}/silu", [x], alpha=1.0)
        if kind == "gelu_quick":
            return self.writer.microsoft("QuickGelu", f"{path}/gelu", [x], alpha=1.702)
        if kind == "relu":
            return self.writer.node("Relu", f"{path}/relu", [x])
        approximate = "tanh" if kind == "gelu_tanh" else "none"
        return self.writer.node("Gelu", f"{path}/gelu", [x], approximate=approximate)

    def _experts(self, layer: str, x: str) -> str:
        """Each expert works on the rows that were routed to it, and on no others."""
        experts = self.config.experts
        assert experts is not None  # `routed` said so
        node, constant = self.writer.node, self.writer.constant
        path = f"/{layer}/mlp"
        active = constant(f"{path}/active", np.array([experts.active], np.int64))
        shares = node("Softmax", f"{path}/shares", [self._router(layer, x)], axis=-1)
        top, chosen = f"{path}/top_shares", f"{path}/chosen"
        node("TopK", f"{path}/top", [shares, active], [top, chosen], axis=-1)
        if experts.normalized:
            total = node("ReduceSum", f"{path}/top_sum", [top, "axis_last"])
            top = node("Div", f"{path}/top_normalized", [top, total])
        nothing = node(
            "Mul", f"{path}/no_shares", [shares, constant(f"{path}/zero", np.zeros((), np.float32))]
        )
        shares = node("ScatterElements", f"{path}/routed", [nothing, chosen, top], axis=1)
        by_expert = node("Transpose", f"{path}/by_expert", [shares], perm=[1, 0])
        # Where shares are, expert after expert: one cut gives each its rows, most of them none.
        # An idle expert then costs its two products of no rows, and no more.
        routed = node("NonZero", f"{path}/routed_places", [by_expert])
        places = node("Transpose", f"{path}/places", [routed], perm=[1, 0])
        whose = node("Gather", f"{path}/whose", [routed, constant(f"{path}/one", np.array(1))])
        rows = node("Gather", f"{path}/x", [x, whose])
        taken = node("Cast", f"{path}/taken", [by_expert], to=TensorProto.BOOL)
        taken = node("Cast", f"{path}/taken_once", [taken], to=TensorProto.INT64)
        counts = node("ReduceSum", f"{path}/counts", [taken, "axis_last"], keepdims=0)
        cut = [f"{path}/rows.{expert}" for expert in range(experts.count)]
        node("Split", f"{path}/cut", [rows, counts], cut, axis=0)
        made = [
            self._one(f"{layer}.experts.{expert}", "mlp", part) for expert, part in enumerate(cut)
        ]
        joined = node("Concat", f"{path}/made", made, axis=0)
        weights = node("GatherND", f"{path}/weights", [by_expert, places])
        weights = node("Unsqueeze", f"{path}/weights_column", [weights, "axis_last"])
        joined = node("Mul", f"{path}/weighted", [joined, weights])
        start = node("ConstantOfShape", f"{path}/start", [node("Shape", f"{path}/shape", [x])])
        column = node("Unsqueeze", f"{path}/whose_column", [whose, "axis_last"])
        return node("ScatterND", f"{path}/y", [start, column, joined], reduction="add")

    def _router(self, layer: str, x: str) -> str:
        """Logits [rows, experts]; kept in fp32, as they choose."""
        return self.linears.linear(layer, "mlp", x, ["router"])
