"""The ONNX graph of a llama-shaped decoder: RMS norms, rotary attention, gated SiLU MLP.

One run takes `new` tokens of each sequence, whose earlier tokens are in the cache:

    input_ids [batch, new] int64       the new tokens
    seqlens_k [batch] int32            tokens in the cache after this run, less one
    total_sequence_length int32        tokens in the cache after this run
    logits_from [1] int64              first position whose logits are wanted: -1 last, 0 all
    past_key_i, past_value_i           [batch, kv_heads, capacity, head_dim], a pair per layer
 -> logits [batch, wanted, vocab]      fp32, for the positions from `logits_from` on
    present_key_i, present_value_i     the caches: bind them to the buffers of the past

Node names are paths (`/layers.0/attn/qkv`, `/layers.0/mlp/down`, `/lm_head`): recipes and
manifests speak of nodes by them. Between attentions the graph works on [batch * new, width], which
is what lets one `Gemm` both multiply and add.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, ValueInfoProto, helper

from leangen.exporters.gguf_blocks import Blocks, Floats, stack
from leangen.exporters.llama import LlamaConfig, Matrix, Weights
from leangen.exporters.onnx_writer import GraphWriter

INT8_ACTIVATIONS, FP32_ACTIVATIONS = 4, 1  # MatMulNBits' accuracy_level


def write(folder: Path, config: LlamaConfig, weights: Weights) -> dict[str, dict[str, Any]]:
    """Write `model.onnx` and `model.onnx.data` into `folder`.

    Returns, for each node that holds a weight matrix, its form, its bits per weight, how many
    weights it has and the precision of its activations. A tied head has the embedding's weights.
    """
    with GraphWriter(folder) as writer:
        graph = _Graph(writer, config, weights)
        graph.build()
        return graph.held


class _Graph:
    def __init__(self, writer: GraphWriter, config: LlamaConfig, weights: Weights) -> None:
        self.writer = writer
        self.config = config
        self.weights = weights
        self.held: dict[str, dict[str, Any]] = {}

    def build(self) -> None:
        config, node = self.config, self.writer.node
        self._shapes_and_rotations()
        residual = self._embed()
        gain = self._gain("layers.0.attn_norm")
        x = node("RMSNormalization", "/layers.0/attn_norm", [residual, gain], **self._epsilon())
        for layer in range(config.layers):
            last = layer == config.layers - 1
            y = self._attention(layer, x)
            if last:  # nothing after attention mixes positions, so drop the unwanted ones here
                y = node("Slice", "/wanted/attended", [y, "logits_from", "end", "axis_1"])
                residual = node("Reshape", "/wanted/unflat", [residual, "batched"])
                residual = node("Slice", "/wanted", [residual, "logits_from", "end", "axis_1"])
                residual = node("Reshape", "/wanted/flat", [residual, "flat"])
            y = node("Reshape", f"/layers.{layer}/attn/flat", [y, "flat_heads"])
            y = self._linear(f"layers.{layer}", "attn", y, ["o"])
            x, residual = self._add_norm(f"layers.{layer}.mlp_norm", y, residual)
            y = self._mlp(layer, x)
            gain = "norm" if last else f"layers.{layer + 1}.attn_norm"
            x, residual = self._add_norm(gain, y, residual)
        logits = self._head(x)
        node("Reshape", "/lm_head/batched", [logits, "batched_vocab"], ["logits"])
        self.writer.save(self._inputs(), self._outputs())

    def _shapes_and_rotations(self) -> None:
        config, node, constant = self.config, self.writer.node, self._ints
        constant("end", np.iinfo(np.int64).max)
        constant("axis_1", 1)
        constant("axis_last", -1)
        constant("any", -1)
        constant("flat", -1, config.width)
        constant("flat_heads", -1, config.heads * config.head_dim)
        constant("any_vocab", -1, config.vocab)
        node("Shape", "/batch_new", ["input_ids"])
        node("Shape", "/batch", ["input_ids"], end=1)
        node("Concat", "/batched", ["/batch_new/y", "any"], ["batched"], axis=0)
        node("Concat", "/batched_vocab", ["/batch/y", "any_vocab"], ["batched_vocab"], axis=0)
        angles = np.outer(np.arange(config.context), self.weights.inverse_frequencies())
        self.writer.constant("rope.cos", np.cos(angles).astype(np.float32))
        self.writer.constant("rope.sin", np.sin(angles).astype(np.float32))

    def _ints(self, name: str, *values: int) -> str:
        return self.writer.constant(name, np.array(values, np.int64))

    def _gain(self, name: str) -> str:
        return self.writer.constant(f"{name}.weight", self.weights.gain(name))

    def _epsilon(self) -> dict[str, Any]:
        return {"axis": -1, "epsilon": self.config.rms_epsilon}

    def _add_norm(self, name: str, x: str, residual: str) -> tuple[str, str]:
        """RMS norm of x + residual with the gain of that name, and the sum itself."""
        path = "/" + name.replace(".mlp", "/mlp").replace(".attn", "/attn")
        total = f"{path}/sum"
        y = self.writer.node(
            "SkipSimplifiedLayerNormalization",
            path,
            [x, residual, self._gain(name)],
            [f"{path}/y", "", "", total],
            domain="com.microsoft",
            epsilon=self.config.rms_epsilon,
        )
        return y, total

    def _attention(self, layer: int, x: str) -> str:
        path = f"/layers.{layer}/attn"
        qkv = self._linear(f"layers.{layer}", "attn", x, ["q", "k", "v"])
        qkv = self.writer.node("Reshape", f"{path}/batched", [qkv, "batched"])
        caches = [f"past_key_{layer}", f"past_value_{layer}"]
        lengths = ["seqlens_k", "total_sequence_length"]
        return self.writer.node(
            "GroupQueryAttention",
            f"{path}/gqa",
            [qkv, "", "", *caches, *lengths, "rope.cos", "rope.sin"],
            [f"{path}/gqa/y", f"present_key_{layer}", f"present_value_{layer}"],
            domain="com.microsoft",
            num_heads=self.config.heads,
            kv_num_heads=self.config.kv_heads,
            do_rotary=1,
            rotary_interleaved=0,
            local_window_size=self.config.window or -1,
        )

    def _mlp(self, layer: int, x: str) -> str:
        path, node = f"/layers.{layer}/mlp", self.writer.node
        both = self._linear(f"layers.{layer}", "mlp", x, ["gate", "up"], "_")
        gate, up = f"{path}/gate_half", f"{path}/up_half"
        node("Split", f"{path}/split", [both], [gate, up], axis=-1, num_outputs=2)
        # QuickGelu with alpha 1 is SiLU, in one pass over the data.
        silu = self.writer.microsoft("QuickGelu", f"{path}/silu", [gate], alpha=1.0)
        gated = node("Mul", f"{path}/gated", [silu, up])
        return self._linear(f"layers.{layer}", "mlp", gated, ["down"])

    def _linear(
        self, layer: str, block: str, x: str, labels: Sequence[str], joint: str = ""
    ) -> str:
        """x @ W^T + b for matrices side by side; neighbours of one form share a node."""
        groups: list[tuple[list[str], list[Matrix]]] = []
        for label in labels:
            matrix = self.weights.matrix(f"{layer}.{label}")
            if not groups or _form(groups[-1][1][0]) != _form(matrix):
                groups.append(([], []))
            groups[-1][0].append(label)
            groups[-1][1].append(matrix)
        parts = [
            self._product(
                f"/{layer}/{block}/{joint.join(names)}",
                x,
                _stacked(matrices),
                self._biases([f"{layer}.{label}" for label in names], matrices),
            )
            for names, matrices in groups
        ]
        if len(parts) == 1:
            return parts[0]
        return self.writer.node("Concat", f"/{layer}/{block}/{joint.join(labels)}", parts, axis=-1)

    def _biases(self, names: Sequence[str], matrices: Sequence[Matrix]) -> Floats | None:
        biases = [self.weights.bias(name) for name in names]
        if all(bias is None for bias in biases):
            return None
        return np.concatenate(
            [
                np.zeros(matrix.shape[0], np.float32) if bias is None else bias
                for bias, matrix in zip(biases, matrices, strict=True)
            ]
        )

    def _product(self, path: str, x: str, weight: Matrix, bias: Floats | None = None) -> str:
        constant, stem = self.writer.constant, path[1:].replace("/", ".")
        if isinstance(weight, Blocks):
            codes = constant(f"{stem}.codes", weight.codes)
            scales = constant(f"{stem}.scales", weight.scales)
            return self._low_bit_product(path, x, weight, codes, scales, bias)
        self._hold(path, weight)
        y = self.writer.node("MatMul", path, [x, constant(f"{stem}.weight", weight.T)])
        if bias is not None:
            y = self.writer.node("Add", f"{path}/bias", [y, constant(f"{stem}.bias", bias)])
        return y

    def _low_bit_product(
        self, path: str, x: str, weight: Blocks, codes: str, scales: str, bias: Floats | None
    ) -> str:
        level = self._accuracy_level(path, weight)
        self._hold(path, weight, activations="fp32" if level == FP32_ACTIVATIONS else "int8")
        stem = path[1:].replace("/", ".")
        inputs = [x, codes, scales]
        if bias is not None:
            inputs += ["", "", self.writer.constant(f"{stem}.bias", bias)]
        n, k = weight.shape
        y = self.writer.microsoft(
            "MatMulNBits",
            path,
            inputs,
            N=n,
            K=k,
            bits=weight.bits,
            block_size=weight.block_size,
            accuracy_level=level,
        )
        if weight.offsets is None:
            return y
        offsets = self.writer.constant(f"{stem}.offsets", weight.offsets)
        in_blocks = self._ints(f"{stem}.blocks", -1, k // weight.block_size, weight.block_size)
        blocks = self.writer.node("Reshape", f"{path}/blocks", [x, in_blocks])
        sums = self.writer.node(
            "ReduceSum", f"{path}/block_sums", [blocks, "axis_last"], keepdims=0
        )
        return self.writer.node("Gemm", f"{path}/offset", [sums, offsets, y], transB=1)

    def _accuracy_level(self, path: str, weight: Blocks) -> int:
        """int8 activations, but fp32 in the last layer's MLP, whose rounding meets the logits raw.

        On SmolLM2-135M that takes a fifth off the KL divergence and costs too little to measure.
        ORT's 8-bit kernel has no fast fp32 path (40 times slower), so only 4-bit nodes get it.
        """
        last_mlp = path.startswith(f"/layers.{self.config.layers - 1}/mlp/")
        return FP32_ACTIVATIONS if last_mlp and weight.bits == 4 else INT8_ACTIVATIONS

    def _embed(self) -> str:
        """The residual stream [batch * new, width] that the tokens start from."""
        node, weight = self.writer.node, self.weights.matrix("embed")
        self._hold("/embed", weight)
        ids = node("Reshape", "/embed/ids", ["input_ids", "any"])
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
        in_blocks = self._ints("embed.blocks", -1, weight.scales.shape[1], weight.block_size)
        x = node("Reshape", "/embed/blocks", [x, in_blocks])
        x = node("Add", "/embed/sum", [x, offsets])
        return node("Reshape", "/embed/flat", [x, "flat"])

    def _head(self, x: str) -> str:
        """Logits [batch * wanted, vocab]; a tied head computes with the embedding's bytes."""
        if not self.config.tied_head:
            return self._product("/lm_head", x, self.weights.matrix("head"))
        if self.held["/embed"]["form"] == "fp32":
            self.held["/lm_head"] = self.held["/embed"]
            return self.writer.microsoft("FusedMatMul", "/lm_head", [x, "embed.weight"], transB=1)
        weight = self.weights.matrix("embed")
        assert isinstance(weight, Blocks)  # its form is not fp32
        codes = self.writer.view("lm_head.codes", weight.codes, of="embed.codes")
        return self._low_bit_product("/lm_head", x, weight, codes, "embed.scales", None)

    def _hold(self, path: str, weight: Matrix, *, activations: str = "fp32") -> None:
        self.held[path] = {
            "form": _form(weight),
            "bits_per_weight": weight.bits_per_weight if isinstance(weight, Blocks) else 32.0,
            "weights": int(np.prod(weight.shape)),
            "activations": activations,
        }

    def _caches(self, prefix: str) -> list[ValueInfoProto]:
        shape: list[str | int | None] = [
            "batch",
            self.config.kv_heads,
            "capacity",
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
        ]

    def _outputs(self) -> list[ValueInfoProto]:
        shape: list[str | int | None] = ["batch", "wanted", self.config.vocab]
        logits = helper.make_tensor_value_info("logits", TensorProto.FLOAT, shape)
        return [logits, *self._caches("present")]


def _form(matrix: Matrix) -> str:
    return matrix.form if isinstance(matrix, Blocks) else "fp32"


def _stacked(matrices: Sequence[Matrix]) -> Matrix:
    blocks = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
    if blocks:
        return stack(blocks)
    return np.concatenate([matrix for matrix in matrices if not isinstance(matrix, Blocks)])
