"""Writes the MLPs of a language model, gated or plain, one per layer or one per expert."""

from __future__ import annotations

import numpy as np

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
        first = constant(f"{path}/axis", np.array([0], np.int64))
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
        shape = node("Shape", f"{path}/shape", [x])
        y = node("ConstantOfShape", f"{path}/start", [shape])
        for expert in range(experts.count):
            name = f"{path}/experts.{expert}"
            index = constant(f"{name}/index", np.array(expert))
            share = node("Gather", f"{name}/share", [by_expert, index], axis=0)
            rows = node("Squeeze", f"{name}/row", [node("NonZero", f"{name}/rows", [share]), first])
            made = self._one(
                f"{layer}.experts.{expert}", "mlp", node("Gather", f"{name}/x", [x, rows])
            )
            weight = node("Gather", f"{name}/weight", [share, rows])
            weight = node("Unsqueeze", f"{name}/weight_column", [weight, "axis_last"])
            made = node("Mul", f"{name}/weighted", [made, weight])
            column = node("Unsqueeze", f"{name}/row_column", [rows, "axis_last"])
            y = node("ScatterND", f"{name}/y", [y, column, made], reduction="add")
        return y

    def _router(self, layer: str, x: str) -> str:
        """Logits [rows, experts]; kept in fp32, as they choose."""
        return self.linears.linear(layer, "mlp", x, ["router"])
