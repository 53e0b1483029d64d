"""The ONNX graph of a language model's decoder, as a `DecoderConfig` describes it.

One run takes `new` tokens of each sequence, whose earlier tokens are in the cache:

    input_ids [batch, new] int64       the new tokens
    seqlens_k [batch] int32            tokens in the cache after this run, less one
    total_sequence_length int32        tokens in the cache after this run
    logits_from [1] int64              first position whose logits are wanted: -1 last, 0 all
    past_key_i, past_value_i           [batch, kv_heads, capacity, head_dim], a pair per layer
 -> logits [batch, wanted, vocab]      fp32, for the positions from `logits_from` on
    present_key_i, present_value_i     the caches: bind them to the buffers of the past

A decoder beside an encoder also takes `cross_key_i`, `cross_value_i` [batch, heads, source,
head_dim], which the encoder's graph computes once (see `encoder_graph`).

Node names are paths (`/layers.0/attn/qkv`, `/layers.0/mlp/down`, `/lm_head`): recipes and
manifests speak of nodes by them. Between attentions the graph works on [batch * new, width], which
is what lets one `Gemm` both multiply and add.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from leangen.exporters import relative_bias
from leangen.exporters.decoder import DecoderConfig, Weights
from leangen.exporters.gguf_blocks import Blocks
from leangen.exporters.llm_stack import Stack
from leangen.exporters.onnx_writer import GraphWriter


def write(
    folder: Path, config: DecoderConfig, weights: Weights, stem: str = "model"
) -> dict[str, dict[str, Any]]:
    """Write `model.onnx` and `model.onnx.data`, or files of another stem, into `folder`.

    Returns, for each node that holds a weight matrix, its form, its bits per weight, how many
    weights it has and the precision of its activations. A tied head has the embedding's weights.
    """
    with GraphWriter(folder, stem) as writer:
        graph = _Graph(writer, config, weights)
        graph.build()
        return graph.linears.held


class _Graph(Stack):
    def build(self) -> None:
        config, node = self.config, self.writer.node
        self._shapes_and_rotations()
        residual, y = self._embed(), ""
        for layer in range(config.layers):
            path = f"layers.{layer}"
            x, residual = self.enter(f"{path}.attn_norm", y, residual)
            y = self._attention(layer, x)
            if layer == config.layers - 1:
                # Nothing after attention mixes positions, so drop the unwanted ones here.
                y = node("Slice", "/wanted/attended", [y, "logits_from", "end", "axis_1"])
                residual = node("Reshape", "/wanted/unflat", [residual, "batched"])
                residual = node("Slice", "/wanted", [residual, "logits_from", "end", "axis_1"])
                residual = node("Reshape", "/wanted/flat", [residual, "flat"])
            y = node("Reshape", f"/{path}/attn/flat", [y, "flat_heads"])
            y = self.linears.linear(path, "attn", y, ["o"])
            y, residual = self.leave(f"{path}.attn_post_norm", y, residual)
            if config.cross:
                x, residual = self.enter(f"{path}.cross_norm", y, residual)
                y = self._cross_attention(layer, x)
                y, residual = self.leave(f"{path}.cross_post_norm", y, residual)
            if config.parallel:
                x = self.norm(f"{path}.mlp_norm", residual)
                y = node("Add", f"/{path}/both", [y, self.mlps.mlp(layer, x)])
            else:
                x, residual = self.enter(f"{path}.mlp_norm", y, residual)
                y = self.mlps.mlp(layer, x)
                y, residual = self.leave(f"{path}.mlp_post_norm", y, residual)
        logits = self._head(self.last("norm", y, residual))
        if config.logit_softcap:
            cap = self.writer.constant("logit_softcap", np.array(config.logit_softcap, np.float32))
            logits = node("Div", "/lm_head/capped", [logits, cap])
            logits = node("Mul", "/lm_head/cap", [node("Tanh", "/lm_head/tanh", [logits]), cap])
        node("Reshape", "/lm_head/batched", [logits, "batched_vocab"], ["logits"])
        self.writer.save(self._inputs(), self._outputs())

    def _shapes_and_rotations(self) -> None:
        config, node, constant = self.config, self.writer.node, self.ints
        self.common_shapes()
        constant("end", np.iinfo(np.int64).max)
        constant("axis_1", 1)
        constant("any_vocab", -1, config.head_vocab or config.vocab)
        node("Shape", "/batch_new", ["input_ids"])
        node("Shape", "/batch", ["input_ids"], end=1)
        node("Concat", "/batched", ["/batch_new/y", "any"], ["batched"], axis=0)
        node("Concat", "/batched_vocab", ["/batch/y", "any_vocab"], ["batched_vocab"], axis=0)
        if config.cross:
            constant("any_heads", -1, config.heads * config.head_dim)
            node("Concat", "/batched_heads", ["/batch/y", "any_heads"], ["batched_heads"], axis=0)
        if config.relative is not None:
            relative_bias.causal(self.writer, config.relative, self.weights)
        for table in sorted({config.rotation(layer) for layer in range(config.layers)} - {""}):
            cosines, sines = self.weights.rotation(table)
            self.writer.constant(f"{table}.cos", cosines.astype(np.float32))
            self.writer.constant(f"{table}.sin", sines.astype(np.float32))

    def _attention(self, layer: int, x: str) -> str:
        config, path = self.config, f"/layers.{layer}/attn"
        qkv = self.linears.linear(f"layers.{layer}", "attn", x, ["q", "k", "v"])
        if config.query_key_norm == "none":
            heads = [self.writer.node("Reshape", f"{path}/batched", [qkv, "batched"]), "", ""]
        else:
            heads = self._normed_heads(layer, qkv)
        caches = [f"past_key_{layer}", f"past_value_{layer}"]
        lengths = ["seqlens_k", "total_sequence_length"]
        table = config.rotation(layer)
        special: dict[str, Any] = {}
        if window := config.window(layer):
            special["local_window_size"] = window
        special |= self.scale()
        if config.attention_softcap:
            special["softcap"] = config.attention_softcap
        positions = [f"{table}.cos", f"{table}.sin"] if table else []
        if config.relative is not None:
            positions = ["", "", "", relative_bias.NAME]
        return self.writer.node(
            "GroupQueryAttention",
            f"{path}/gqa",
            [*heads, *caches, *lengths, *positions],
            [f"{path}/gqa/y", f"present_key_{layer}", f"present_value_{layer}"],
            domain="com.microsoft",
            num_heads=config.heads,
            kv_num_heads=config.kv_heads,
            do_rotary=int(bool(table)),
            rotary_interleaved=0,
            **special,
        )

    def _cross_attention(self, layer: int, x: str) -> str:
        config, node, path = self.config, self.writer.node, f"/layers.{layer}/cross"
        q = self.linears.linear(f"layers.{layer}", "cross", x, ["cross_q"])
        q = node("Reshape", f"{path}/batched", [q, "batched_heads"])
        y = self.writer.microsoft(
            "MultiHeadAttention",
            f"{path}/mha",
            [q, f"cross_key_{layer}", f"cross_value_{layer}"],
            num_heads=config.heads,
            **self.scale(),
        )
        y = node("Reshape", f"{path}/flat", [y, "flat_heads"])
        return self.linears.linear(f"layers.{layer}", "cross", y, ["cross_o"])

    def _normed_heads(self, layer: int, qkv: str) -> list[str]:
        """Queries, keys and values apart, the first two normed."""
        config, node, path = self.config, self.writer.node, f"/layers.{layer}/attn"
        widths = [config.heads * config.head_dim, *[config.kv_heads * config.head_dim] * 2]
        parts = [f"{path}/{name}_part" for name in "qkv"]
        node("Split", f"{path}/split", [qkv, self.ints(f"{path}/widths", *widths)], parts, axis=-1)
        heads = []
        for label, part in zip("qkv", parts, strict=True):
            if label != "v":
                if config.query_key_norm == "head":
                    shape = self.ints(f"{path}/{label}_heads", -1, config.head_dim)
                    part = node("Reshape", f"{path}/{label}_by_head", [part, shape])
                part = self.norm(f"layers.{layer}.{label}_norm", part, f"{path}/{label}_norm")
            heads.append(node("Reshape", f"{path}/{label}_batched", [part, "batched"]))
        return heads

    def _embed(self) -> str:
        """The residual stream [batch * new, width] that the tokens start from."""
        node = self.writer.node
        x = self.embedded(node("Reshape", "/embed/ids", ["input_ids", "any"]))
        if self.config.learned_positions:
            table = self.writer.constant("positions.weight", self.weights.matrix("positions"))  # type: ignore[arg-type]
            rows = node("Gather", "/positions", [table, self._positions()])
            x = node("Add", "/embed/placed", [x, rows])
        return x

    def _positions(self) -> str:
        """The places [batch * new] of the new tokens in their sequences."""
        node, constant = self.writer.node, self.writer.constant
        one = constant("one", np.array(1))
        shape = node("Shape", "/positions/shape", ["input_ids"], start=1)
        new = node("Squeeze", "/positions/new", [shape])
        last = node("Cast", "/positions/last", ["seqlens_k"], to=TensorProto.INT64)
        first = node("Sub", "/positions/before", [last, new])
        first = node("Unsqueeze", "/positions/column", [first, "axis_last"])
        steps = node(
            "Range", "/positions/steps", [one, node("Add", "/positions/end", [new, one]), one]
        )
        places = node("Add", "/positions/places", [first, steps])
        return node("Reshape", "/positions/flat", [places, "any"])

    def _head(self, x: str) -> str:
        """Logits [batch * wanted, vocab]; a tied head computes with the embedding's bytes."""
        linears = self.linears
        if self.config.head_scale != 1:
            scale = self.writer.constant("head.scale", np.array(self.config.head_scale, np.float32))
            x = self.writer.node("Mul", "/lm_head/scaled", [x, scale])
        if not self.config.tied_head:
            head, bias = self.weights.matrix("head"), self.weights.bias("head")
            return linears.product("/lm_head", x, head, bias)
        if linears.held["/embed"]["form"] == "fp32":
            linears.held["/lm_head"] = linears.held["/embed"]
            return self.writer.microsoft("FusedMatMul", "/lm_head", [x, "embed.weight"], transB=1)
        weight = self.weights.matrix("embed")
        assert isinstance(weight, Blocks)  # its form is not fp32
        codes = self.writer.view("lm_head.codes", weight.codes, of="embed.codes")
        return linears.low_bit_product("/lm_head", x, weight, codes, "embed.scales", None)

    def _caches(self, prefix: str, length: str = "capacity") -> list[ValueInfoProto]:
        shape: list[str | int | None] = [
            "batch",
            self.config.kv_heads,
            length,
            self.config.head_dim,
        ]
        return [
            helper.make_tensor_value_info(f"{prefix}_{kind}_{layer}", TensorProto.FLOAT, shape)
            for layer in range(self.config.layers)
            for kind in ("key", "value")
        ]

    def _inputs(self) -> list[ValueInfoProto]:
        info = helper.make_tensor_value_info
        return [
            info("input_ids", TensorProto.INT64, ["batch", "new"]),
            info("seqlens_k", TensorProto.INT32, ["batch"]),
            info("total_sequence_length", TensorProto.INT32, []),
            info("logits_from", TensorProto.INT64, [1]),
            *self._caches("past"),
            *(self._caches("cross", "source") if self.config.cross else []),
        ]

    def _outputs(self) -> list[ValueInfoProto]:
        vocab = self.config.head_vocab or self.config.vocab
        shape: list[str | int | None] = ["batch", "wanted", vocab]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._caches("present")]
