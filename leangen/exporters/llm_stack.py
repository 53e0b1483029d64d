"""What stands around the blocks of a stack of layers: embedding, norms, the residual stream."""

from __future__ import annotations

import numpy as np

from leangen.exporters.decoder import DecoderConfig, Weights
from leangen.exporters.gguf_blocks import Blocks
from leangen.exporters.llm_linear import Linears
from leangen.exporters.llm_mlp import Mlps
from leangen.exporters.onnx_writer import GraphWriter


class Stack:
    """The parts that the graph of a decoder and that of an encoder are built of.

    `prefix` stands before the names of an encoder's weights and nodes.
    """

    def __init__(
        self, writer: GraphWriter, config: DecoderConfig, weights: Weights, prefix: str = ""
    ) -> None:
        self.writer = writer
        self.config = config
        self.weights = weights
        self.prefix = prefix
        # Rounding in the last layer's MLP meets the logits raw: int8 activations everywhere but
        # there take a fifth off the KL divergence of SmolLM2-135M and cost too little to measure.
        self.linears = Linears(writer, weights, exact=f"/layers.{config.layers - 1}/mlp/")
        self.mlps = Mlps(config, self.linears, prefix)

    def ints(self, name: str, *values: int) -> str:
        """A constant of whole numbers."""
        return self.writer.constant(name, np.array(values, np.int64))

    def common_shapes(self) -> None:
        """The constants `axis_last`, `any`, `flat` and `flat_heads`."""
        self.ints("axis_last", -1)
        self.ints("any", -1)
        self.ints("flat", -1, self.config.width)
        self.ints("flat_heads", -1, self.config.heads * self.config.head_dim)

    def scale(self) -> dict[str, float]:
        """The attribute of attention, where it is not 1 / sqrt(head_dim)."""
        scale = self.config.attention_scale
        return {} if scale is None else {"scale": scale}

    def enter(self, name: str, y: str, residual: str) -> tuple[str, str]:
        """What a block reads, and the residual stream with the block before added."""
        if self.config.norms in ("before", "both"):
            if y:
                return self._add_norm(name, y, residual)
            return self.norm(name, residual), residual
        if y:
            residual = self.writer.node("Add", f"{_path(name)}/sum", [residual, y])
        return residual, residual

    def leave(self, name: str, y: str, residual: str) -> tuple[str, str]:
        """What a block adds to the residual stream (empty: nothing any more), and the stream."""
        if self.config.norms == "sum":
            return "", self._add_norm(name, y, residual)[0]
        return y if self.config.norms == "before" else self.norm(name, y), residual

    def last(self, name: str, y: str, residual: str) -> str:
        """What the last block left behind, normed unless each sum was."""
        return self._add_norm(name, y, residual)[0] if y else residual

    def norm(self, name: str, x: str, path: str = "") -> str:
        """Norm of each row, with the gain of that name."""
        op = "RMSNormalization" if self.config.norm == "rms" else "LayerNormalization"
        inputs = [x, *self._gain_and_bias(name)]
        return self.writer.node(
            op, path or _path(name), inputs, axis=-1, epsilon=self.config.epsilon
        )

    def _add_norm(self, name: str, x: str, residual: str) -> tuple[str, str]:
        """Norm of x + residual with the gain of that name, and the sum itself."""
        path = _path(name)
        simplified = "Simplified" if self.config.norm == "rms" else ""
        total = f"{path}/sum"
        y = self.writer.node(
            f"Skip{simplified}LayerNormalization",
            path,
            [x, residual, *self._gain_and_bias(name)],
            [f"{path}/y", "", "", total],
            domain="com.microsoft",
            epsilon=self.config.epsilon,
        )
        return y, total

    def _gain_and_bias(self, name: str) -> list[str]:
        gain = self.writer.constant(f"{name}.weight", self.weights.gain(name))
        bias = self.weights.bias(name)
        return [gain] if bias is None else [gain, self.writer.constant(f"{name}.bias", bias)]

    def embedded(self, ids: str) -> str:
        """The embeddings [rows, width] of token ids [rows]."""
        x = self._looked_up(ids)
        if self.config.embedding_scale == 1:
            return x
        scale = np.array(self.config.embedding_scale, np.float32)
        return self.writer.node(
            "Mul", "/embed/scaled", [x, self.writer.constant("embed.scale", scale)]
        )

    def _looked_up(self, ids: str) -> str:
        node, weight = self.writer.node, self.weights.matrix(f"{self.prefix}embed")
        self.linears.hold("/embed", weight)
        if not isinstance(weight, Blocks):
            return node("Gather", "/embed", [self.writer.constant("embed.weight", weight), ids])
        codes = self.writer.constant("embed.codes", weight.codes.reshape(weight.shape[0], -1))
        scales = self.writer.constant("embed.scales", weight.scales)
        x = self.writer.microsoft(
            "GatherBlockQuantized",
            "/embed",
            [codes, ids, scales],
            bits=weight.bits,
            block_size=weight.block_size,
            gather_axis=0,
            quantize_axis=1,
        )
        if weight.offsets is None:
            return x
        table = self.writer.constant("embed.offsets", weight.offsets)
        offsets = node("Gather", "/embed/offsets", [table, ids])
        offsets = node("Unsqueeze", "/embed/offset", [offsets, "axis_last"])
        in_blocks = self.ints("embed.blocks", -1, weight.scales.shape[1], weight.block_size)
        x = node("Reshape", "/embed/blocks", [x, in_blocks])
        x = node("Add", "/embed/sum", [x, offsets])
        return node("Reshape", "/embed/flat", [x, "flat"])


def _path(name: str) -> str:
    """`layers.0.attn_norm` -> `/layers.0/attn_norm`."""
    layer, dot, label = name.rpartition(".")
    return f"/{layer}/{label}" if dot else f"/{name}"
