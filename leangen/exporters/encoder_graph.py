"""The ONNX graph of the encoder of an encoder-decoder, with what its decoder makes of it once.

    input_ids [batch, source] int64, or features [batch, mels, frames] fp32 (log-mel, see
        `leangen.families.whisper_mel`; two frames make one position)
 -> cross_key_i, cross_value_i [batch, heads, source, head_dim], a pair per layer of the decoder

The keys and values that the decoder attends to are computed here, once for all of its steps.
Nodes of the encoder have paths that begin with `/encoder.`; those of the decoder's projections
`/layers.I/cross`, as in the decoder's own graph.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from onnx import TensorProto, ValueInfoProto, helper

from leangen.exporters import relative_bias
from leangen.exporters.decoder import DecoderConfig, Weights
from leangen.exporters.llm_stack import Stack
from leangen.exporters.onnx_writer import GraphWriter


def write(
    folder: Path, config: DecoderConfig, decoder: DecoderConfig, weights: Weights, *, mels: int = 0
) -> dict[str, dict[str, Any]]:
    """Write `encoder.onnx` and `encoder.onnx.data` into `folder`; returns what `llm_graph` does.

    `mels` is the number of bands of sound that it reads, 0 for an encoder of tokens.
    """
    with GraphWriter(folder, "encoder") as writer:
        graph = _Encoder(writer, config, weights, "encoder.")
        graph.decoder = decoder
        graph.build(mels)
        return graph.linears.held


class _Encoder(Stack):
    decoder: DecoderConfig

    def build(self, mels: int) -> None:
        self.common_shapes()
        residual, y = self._convolved() if mels else self._tokens(), ""
        for layer in range(self.config.layers):
            path = f"encoder.layers.{layer}"
            x, residual = self.enter(f"{path}.attn_norm", y, residual)
            y = self.linears.linear(path, "attn", self._attention(layer, x), ["o"])
            y, residual = self.leave(f"{path}.attn_post_norm", y, residual)
            x, residual = self.enter(f"{path}.mlp_norm", y, residual)
            y = self.mlps.mlp(layer, x)
            y, residual = self.leave(f"{path}.mlp_post_norm", y, residual)
        states = self.last("encoder.norm", y, residual)
        outputs = [
            self._cross(layer, kind, states)
            for layer in range(self.decoder.layers)
            for kind in ("key", "value")
        ]
        info = helper.make_tensor_value_info
        given = info("input_ids", TensorProto.INT64, ["batch", "source"])
        if mels:
            given = info("features", TensorProto.FLOAT, ["batch", mels, 2 * self.config.context])
        self.writer.save([given], outputs)

    def _tokens(self) -> str:
        """The rows [batch * source, width] that tokens start from; learned places are added."""
        node = self.writer.node
        self._lengths("input_ids")
        x = self.embedded(node("Reshape", "/embed/ids", ["input_ids", "any"]))
        if self.config.relative is not None:
            source = node("Squeeze", "/source/length", ["source"])
            relative_bias.bidirectional(self.writer, self.config.relative, self.weights, source)
        if self.config.learned_positions:
            first = self.ints("first", 0)
            places = node("Slice", "/encoder.positions", [self._places(), first, "source", first])
            x = node("Reshape", "/embed/batched", [x, "batched"])
            x = node("Add", "/embed/placed", [x, places])
            x = node("Reshape", "/embed/placed_flat", [x, "flat"])
        return x

    def _convolved(self) -> str:
        """The rows that sound starts from: two convolutions, the second of stride 2 (Whisper)."""
        node, x = self.writer.node, "features"
        for name, stride in (("conv1", 1), ("conv2", 2)):
            inputs = [x]
            for kind, array in (
                ("weight", self.weights.matrix(f"encoder.{name}")),
                ("bias", self.weights.bias(f"encoder.{name}")),
            ):
                inputs.append(self.writer.constant(f"encoder.{name}.{kind}", array))  # type: ignore[arg-type]
            x = node("Conv", f"/encoder.{name}", inputs, pads=[1, 1], strides=[stride])
            x = node("Gelu", f"/encoder.{name}/gelu", [x])
        x = node("Transpose", "/encoder.conv2/rows", [x], perm=[0, 2, 1])
        self._lengths(x)
        x = node("Add", "/encoder.conv2/placed", [x, self._places()])
        return node("Reshape", "/encoder.conv2/flat", [x, "flat"])

    def _places(self) -> str:
        table = self.weights.matrix("encoder.positions")
        return self.writer.constant("encoder.positions.weight", table)  # type: ignore[arg-type]

    def _lengths(self, batched: str) -> None:
        """`source`; `batched`, `by_head`: what makes [batch, source, any (or heads)] of rows."""
        node, decoder = self.writer.node, self.decoder
        node("Shape", "/source", [batched], ["source"], start=1, end=2)
        both = node("Shape", "/batch_source", [batched], end=2)
        node("Concat", "/batched", [both, "any"], ["batched"], axis=0)
        heads = self.ints("heads", decoder.heads, decoder.head_dim)
        node("Concat", "/by_head", [both, heads], ["by_head"], axis=0)

    def _attention(self, layer: int, x: str) -> str:
        config, node, path = self.config, self.writer.node, f"/encoder.layers.{layer}/attn"
        qkv = self.linears.linear(f"encoder.layers.{layer}", "attn", x, ["q", "k", "v"])
        parts = [f"{path}/{name}" for name in "qkv"]
        node("Split", f"{path}/split", [qkv], parts, axis=-1, num_outputs=3)
        heads = [node("Reshape", f"{part}_batched", [part, "batched"]) for part in parts]
        bias = ["", "", relative_bias.NAME] if config.relative is not None else []
        y = self.writer.microsoft(
            "MultiHeadAttention",
            f"{path}/mha",
            [*heads, *bias],
            num_heads=config.heads,
            **self.scale(),
        )
        return node("Reshape", f"{path}/flat", [y, "flat_heads"])

    def _cross(self, layer: int, kind: str, states: str) -> ValueInfoProto:
        """The keys or the values of a layer of the decoder, as an output."""
        node, name = self.writer.node, f"cross_{kind}_{layer}"
        x = self.linears.linear(f"layers.{layer}", "cross", states, [f"cross_{kind[0]}"])
        x = node("Reshape", f"/{name}/by_head", [x, "by_head"])
        node("Transpose", f"/{name}", [x], [name], perm=[0, 2, 1, 3])
        return helper.make_tensor_value_info(
            name, TensorProto.FLOAT, ["batch", self.decoder.heads, "source", self.decoder.head_dim]
        )
