"""Writes the linear layers of a language model: float matrices, and low-bit blocks as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from leangen.exporters.decoder import Matrix, Weights
from leangen.exporters.gguf_blocks import Blocks, Floats, stack
from leangen.exporters.onnx_writer import GraphWriter

INT8_ACTIVATIONS, FP32_ACTIVATIONS = 4, 1  # MatMulNBits' accuracy_level


class Linears:
    """Adds linear layers to a graph and keeps account of the matrices in it.

    `held` says for each node its form, its bits per weight, how many weights it has and the
    precision of its activations. Nodes whose path starts with `exact` compute low-bit weights with
    fp32 activations.
    """

    def __init__(self, writer: GraphWriter, weights: Weights, *, exact: str) -> None:
        self.writer = writer
        self.weights = weights
        self.exact = exact
        self.held: dict[str, dict[str, Any]] = {}

    def linear(self, layer: str, block: str, x: str, labels: Sequence[str], joint: str = "") -> str:
        """x @ W^T + b for matrices side by side; neighbours of one form share a node."""
        groups: list[tuple[list[str], list[Matrix]]] = []
        for label in labels:
            matrix = self.weights.matrix(f"{layer}.{label}")
            if not groups or form(groups[-1][1][0]) != form(matrix):
                groups.append(([], []))
            groups[-1][0].append(label)
            groups[-1][1].append(matrix)
        parts = [
            self.product(
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

    def product(self, path: str, x: str, weight: Matrix, bias: Floats | None = None) -> str:
        """x @ W^T + b for one matrix."""
        constant, stem = self.writer.constant, path[1:].replace("/", ".")
        if isinstance(weight, Blocks):
            codes = constant(f"{stem}.codes", weight.codes)
            scales = constant(f"{stem}.scales", weight.scales)
            return self.low_bit_product(path, x, weight, codes, scales, bias)
        self.hold(path, weight)
        y = self.writer.node("MatMul", path, [x, constant(f"{stem}.weight", weight.T)])
        if bias is not None:
            y = self.writer.node("Add", f"{path}/bias", [y, constant(f"{stem}.bias", bias)])
        return y

    def low_bit_product(
        self, path: str, x: str, weight: Blocks, codes: str, scales: str, bias: Floats | None
    ) -> str:
        """x @ W^T + b where the constants of the blocks are in the graph already."""
        level = self._accuracy_level(path, weight)
        self.hold(path, weight, activations="fp32" if level == FP32_ACTIVATIONS else "int8")
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
        in_blocks = self.writer.constant(
            f"{stem}.blocks", np.array([-1, k // weight.block_size, weight.block_size], np.int64)
        )
        blocks = self.writer.node("Reshape", f"{path}/blocks", [x, in_blocks])
        sums = self.writer.node(
            "ReduceSum", f"{path}/block_sums", [blocks, "axis_last"], keepdims=0
        )
        return self.writer.node("Gemm", f"{path}/offset", [sums, offsets, y], transB=1)

    def _accuracy_level(self, path: str, weight: Blocks) -> int:
        # ORT's 8-bit kernel has no fast fp32 path (40 times slower), so only 4-bit nodes get it.
        return (
            FP32_ACTIVATIONS
            if path.startswith(self.exact) and weight.bits == 4
            else INT8_ACTIVATIONS
        )

    def hold(self, path: str, weight: Matrix, *, activations: str = "fp32") -> None:
        """Note that the node `path` has this matrix."""
        self.held[path] = {
            "form": form(weight),
            "bits_per_weight": weight.bits_per_weight if isinstance(weight, Blocks) else 32.0,
            "weights": int(np.prod(weight.shape)),
            "activations": activations,
        }


def form(matrix: Matrix) -> str:
    """`fp32`, or the name of the blocks' format."""
    return matrix.form if isinstance(matrix, Blocks) else "fp32"


def _stacked(matrices: Sequence[Matrix]) -> Matrix:
    blocks = [matrix for matrix in matrices if isinstance(matrix, Blocks)]
    if blocks:
        return stack(blocks)
    return np.concatenate([matrix for matrix in matrices if not isinstance(matrix, Blocks)])
