"""A llama in float64 NumPy from a GGUF file, linear layers through the kernels' NumPy twin."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from leangen_kernels import reference

from leangen.exporters.gguf_checkpoint import Checkpoint, GgufFile


class Twin:
    """`int8` activations are rounded per block before every matrix, keys and values to fp16.

    exact_last_mlp: but not in the last layer's MLP, as the exporter asks where it has 4 bits.
    """

    def __init__(
        self, path: Path, *, activations: str = "int8", exact_last_mlp: bool = True
    ) -> None:
        self.exact_last_mlp = exact_last_mlp
        self.weights = Checkpoint(GgufFile(path), keep_blocks=False)
        self.config = self.weights.config
        self.activations = activations
        self._matrices: dict[str, np.ndarray] = {}

    def matrix(self, name):
        if name not in self._matrices:
            self._matrices[name] = np.asarray(self.weights.matrix(name), np.float64)
        return self._matrices[name]

    def linear(self, name, x, *, exact=False):
        if self.activations == "int8" and not exact:
            x = reference.dequantize(*reference.quantize(x.astype(np.float32)))
        y = x @ self.matrix(name).T
        bias = None if name in ("embed", "head") else self.weights.bias(name)
        return y if bias is None else y + bias

    def norm(self, name, x):
        return reference.rms_norm(x, self.weights.gain(name), self.config.epsilon)

    def logits(self, tokens, *, nudge=0.0):
        """Logits [n, vocab] after each token; `nudge` is a relative error of the embeddings."""
        config = self.config
        tables = self.weights.rotation(config.rotation(0))
        cosines, sines = (table[: len(tokens)] for table in tables)
        later = np.triu(np.full((len(tokens), len(tokens)), -np.inf), 1)
        h = self.matrix("embed")[tokens]
        h = h * (1 + nudge * np.random.default_rng(0).standard_normal(h.shape))
        for i in range(config.layers):
            layer = f"layers.{i}"
            x = self.norm(f"{layer}.attn_norm", h)
            q, k, v = (
                self.linear(f"{layer}.{name}", x)
                .reshape(len(tokens), -1, config.head_dim)
                .swapaxes(0, 1)
                for name in "qkv"
            )
            q, k = (reference.rotate(rows, cosines, sines) for rows in (q, k))
            if self.activations == "int8":
                k, v = (rows.astype(np.float16).astype(np.float64) for rows in (k, v))
            k, v = (np.repeat(rows, config.heads // config.kv_heads, axis=0) for rows in (k, v))
            scores = q @ k.swapaxes(1, 2) / np.sqrt(config.head_dim) + later
            shares = np.exp(scores - scores.max(-1, keepdims=True))
            seen = (shares / shares.sum(-1, keepdims=True)) @ v
            h = h + self.linear(f"{layer}.o", seen.swapaxes(0, 1).reshape(len(tokens), -1))
            exact = self.exact_last_mlp and i == config.layers - 1
            x = self.norm(f"{layer}.mlp_norm", h)
            gate, up = (self.linear(f"{layer}.{name}", x, exact=exact) for name in ("gate", "up"))
            h = h + self.linear(f"{layer}.down", gate / (1 + np.exp(-gate)) * up, exact=exact)
        return self.linear("embed" if config.tied_head else "head", self.norm("norm", h))
