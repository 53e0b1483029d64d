"""Writes the graph of a BERT encoder (Devlin et al., arXiv 1810.04805): a vector per token.

Inputs `input_ids` and `attention_mask`, int64 [n, t]; output `last_hidden_state` [n, t, d]. All
tokens are of the first segment, whose embedding is added to the positions'.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from leangen.errors import UnsupportedError
from leangen.exporters.onnx_writer import Array, GraphWriter

INPUTS = ("input_ids", "attention_mask")
OUTPUT = "last_hidden_state"
ACTIVATIONS = {"gelu": "none", "gelu_new": "tanh", "gelu_pytorch_tanh": "tanh"}
"""`hidden_act` of a `config.json`, and how ONNX's Gelu approximates it."""


def write(folder: Path, config: Mapping[str, Any], tensor: Callable[[str], Array]) -> None:
    """Write `model.onnx` of a model of that `config.json`; `tensor` gives a weight by its name.

    Raises UnsupportedError for a variant of BERT that it cannot build.
    """
    remedy = "export it to ONNX, and give the folder with model.onnx and tokenizer.json"
    positions = config.get("position_embedding_type", "absolute")
    if positions != "absolute":
        raise UnsupportedError(f"the model has {positions} positions, expected absolute: {remedy}")
    if str(config["hidden_act"]) not in ACTIVATIONS:
        raise UnsupportedError(
            f"the model's activation is {config['hidden_act']!r}, expected one of "
            f"{', '.join(ACTIVATIONS)}: {remedy}"
        )
    with GraphWriter(folder) as writer:
        _Encoder(writer, config, tensor).write()


class _Encoder:
    def __init__(
        self, writer: GraphWriter, config: Mapping[str, Any], tensor: Callable[[str], Array]
    ) -> None:
        self._writer = writer
        self._config = config
        self._tensor = tensor

    def write(self) -> None:
        node = self._writer.node
        x = node("Add", "/embed/sum", [self._words(), self._positions()])
        x = self._norm("/embed/norm", x, "embeddings.LayerNorm")
        mask = node("Cast", "/embed/mask", ["attention_mask"], to=TensorProto.INT32)
        for index in range(self._config["num_hidden_layers"]):
            x = self._layer(index, x, mask)
        node("Identity", "/output", [x], [OUTPUT])
        shape, width = ["n", "t"], self._config["hidden_size"]
        value = helper.make_tensor_value_info
        self._writer.save(
            [value(name, TensorProto.INT64, shape) for name in INPUTS],
            [value(OUTPUT, TensorProto.FLOAT, [*shape, width])],
        )

    def _words(self) -> str:
        words = self._tensor("embeddings.word_embeddings.weight")
        table = self._writer.constant("embed.words", words)
        return self._writer.node("Gather", "/embed/words", [table, "input_ids"])

    def _positions(self) -> str:
        """The first rows of the table of positions, [t, d]."""
        node, constant = self._writer.node, self._writer.constant
        table = self._tensor("embeddings.position_embeddings.weight")
        table = table + self._tensor("embeddings.token_type_embeddings.weight")[0]
        rows, zero = constant("embed.positions", table), constant("zero", np.zeros(1, np.int64))
        length = node("Shape", "/embed/length", ["input_ids"], start=1)
        return node("Slice", "/embed/positions", [rows, zero, length])

    def _layer(self, index: int, x: str, mask: str) -> str:
        node, stem, path = self._writer.node, f"encoder.layer.{index}", f"/layers.{index}"
        parts = [
            self._linear(f"{path}/attention/{name}", x, f"{stem}.attention.self.{name}")
            for name in ("query", "key", "value")
        ]
        seen = self._writer.microsoft(
            "MultiHeadAttention",
            f"{path}/attention",
            [*parts, "", mask],
            num_heads=self._config["num_attention_heads"],
        )
        y = self._linear(f"{path}/attention/out", seen, f"{stem}.attention.output.dense")
        x = node("Add", f"{path}/attention/sum", [x, y])
        x = self._norm(f"{path}/attention/norm", x, f"{stem}.attention.output.LayerNorm")
        y = self._linear(f"{path}/mlp/up", x, f"{stem}.intermediate.dense")
        kind = ACTIVATIONS[self._config["hidden_act"]]
        y = node("Gelu", f"{path}/mlp/gelu", [y], approximate=kind)
        y = self._linear(f"{path}/mlp/down", y, f"{stem}.output.dense")
        x = node("Add", f"{path}/mlp/sum", [x, y])
        return self._norm(f"{path}/mlp/norm", x, f"{stem}.output.LayerNorm")

    def _linear(self, path: str, x: str, tensor: str) -> str:
        stem, constant = path[1:].replace("/", "."), self._writer.constant
        weight = constant(f"{stem}.weight", self._tensor(f"{tensor}.weight").T)
        y = self._writer.node("MatMul", path, [x, weight])
        bias = constant(f"{stem}.bias", self._tensor(f"{tensor}.bias"))
        return self._writer.node("Add", f"{path}/bias", [y, bias])

    def _norm(self, path: str, x: str, tensor: str) -> str:
        stem, constant = path[1:].replace("/", "."), self._writer.constant
        gain = constant(f"{stem}.gain", self._tensor(f"{tensor}.weight"))
        bias = constant(f"{stem}.bias", self._tensor(f"{tensor}.bias"))
        epsilon = float(self._config["layer_norm_eps"])
        return self._writer.node("LayerNormalization", path, [x, gain, bias], epsilon=epsilon)
