"""Which kernels to launch, with what grid and arguments: plain numbers, for whoever launches.

`native/cuda.c` does the same for ONNX Runtime; a test holds the two against each other.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from leangen_kernels.cuda import tiles
from leangen_kernels.layout import BLOCK, ROWS, Form

CURVES = ("none", "gelu_tanh", "gelu", "relu")
MOST_COLUMNS = 16384
"""The longest row that `rows` holds in registers."""
QUERIES = 4
LOG2_E = 1.4426950408889634


@dataclass(frozen=True, slots=True)
class Launch:
    """One kernel launch. Arguments are addresses and sizes, int64, or floats."""

    name: str
    grid: tuple[int, int, int]
    threads: int
    arguments: tuple[int | float, ...]


@dataclass(frozen=True, slots=True)
class Linear:
    """A product with packed weights [n, k], as the operator `Linear` has it."""

    form: Form
    n: int
    k: int
    activations: str = "int8"
    layer: bool = False
    epsilon: float = 1e-5
    gated: bool = False
    curve: str = "none"

    @property
    def half(self) -> bool:
        """Whether activations are halves, else bytes."""
        return self.activations == "fp32" or bool(self.form.table)

    @property
    def kind(self) -> str:
        """What the kernels for these weights are called."""
        return "table" if self.form.table else self.form.name

    @property
    def outputs(self) -> int:
        """Columns of y."""
        return self.n // 2 if self.gated else self.n

    def scratch(self, tokens: int) -> tuple[int, int, int]:
        """Bytes of the rows made ready, of their scales, and of their sums; multiples of 256."""
        columns = tiles.units(self.k) * tiles.UNIT
        per_row = (
            (2 * columns, 4, columns // BLOCK * 4) if self.half else (columns, columns // 4, 0)
        )
        first, second, third = (-(-tokens * size // 256) * 256 for size in per_row)
        return first, second, third

    def launches(
        self, tokens: int, at: Mapping[str, int], multiprocessors: int
    ) -> tuple[Launch, Launch]:
        """Rows made ready, then the product.

        `at` holds addresses: x, weights, y, scratch (256-byte multiple), and, where there are any,
        table, gain, shift, bias, residual.
        """
        units = tiles.units(self.k)
        rows_bytes, scales_bytes, _ = self.scratch(tokens)
        rows, scales = at["scratch"], at["scratch"] + rows_bytes
        sums = scales + scales_bytes
        ready = Launch(
            f"rows_{'a16' if self.half else 'a8'}", (tokens, 1, 1), row_threads(self.k),
            (at["x"], at.get("gain", 0), at.get("shift", 0), rows, scales, sums, self.k, units,
             int(self.layer), self.epsilon),
        )  # fmt: skip
        row_tiles, eights, warps = shape(tokens, self.gated)
        across = -(-tokens // (8 * eights))
        along = -(-self.n // ROWS)
        shift = row_shift(along, row_tiles, warps, across, multiprocessors)
        parts = warps >> shift
        product = Launch(
            f"linear_{self.kind}_{'a16' if self.half else 'a8'}_{row_tiles}x{eights}",
            (-(-along // (row_tiles << shift)), across, 1), 32 * warps,
            (rows, scales, sums, at["weights"], at.get("table", 0), at["y"], at.get("bias", 0),
             at.get("residual", 0), tokens, self.n, units, shift, parts,
             parts * tiles.unit_bytes(self.form), int(self.gated), CURVES.index(self.curve)),
        )  # fmt: skip
        return ready, product

    def dequantize(self, weights: int, table: int, y: int) -> Launch:
        """All weights as halves [n, units * 128]."""
        units = tiles.units(self.k)
        grid = (-(-units // 8), -(-self.n // ROWS), 1)
        return Launch(f"dequantize_{self.kind}", grid, 256, (weights, table, y, self.n, units))


def row_threads(k: int) -> int:
    """Threads for a row: 16 values each, whole warps."""
    return min(-(-k // 512) * 32, 1024)


def shape(tokens: int, gated: bool) -> tuple[int, int, int]:
    """Tiles of rows and eights of tokens of a warp, and warps of a block."""
    if tokens > 8:
        return (2, 2, 4) if tokens <= 16 else (2, 4, 4)
    return (2, 1, 4) if gated else (1, 1, 8)  # a gate and its row are of one warp


def row_shift(along: int, row_tiles: int, warps: int, across: int, multiprocessors: int) -> int:
    """Log2 of the warps of a block that take rows of their own; the others share out k.

    As many as leave two blocks for each multiprocessor.
    """
    shift = 0
    while (2 << shift) <= warps and (
        -(-along // (row_tiles << (shift + 1))) * across >= 2 * multiprocessors
    ):
        shift += 1
    return shift


@dataclass(frozen=True, slots=True)
class Attention:
    """Attention over a cache, as the operator `Attention` has it."""

    heads: int
    kv_heads: int
    width: int
    cache: str = "fp16"
    window: int = 0
    epsilon: float = 1e-5
    scale: float = 0.0

    def splits(self, batch: int, new: int, capacity: int, multiprocessors: int) -> int:
        """In how many parts the positions are read: enough blocks, no part under 64 of capacity."""
        blocks = batch * self.kv_heads * -(-new * (self.heads // self.kv_heads) // QUERIES)
        return max(1, min(4 * multiprocessors // blocks, capacity // 64, 64))

    def scratch(self, batch: int, new: int, splits: int) -> tuple[int, int]:
        """Bytes of the queries made ready, and of what the splits have summed."""
        rows = batch * new * self.heads
        return rows * self.width * 4, rows * splits * (self.width + 2) * 4

    def launches(
        self, batch: int, new: int, capacity: int, at: Mapping[str, int], multiprocessors: int,
        rotations: int | None = None,
    ) -> tuple[Launch, Launch, Launch]:  # fmt: skip
        """Append, attend, merge.

        `at` holds addresses: qkv, last, keys, values, y, scratch, and, where there are any,
        cosines, sines, query_gain, key_gain. rotations: for how many positions, else the capacity.
        """
        group = self.heads // self.kv_heads
        splits = self.splits(batch, new, capacity, multiprocessors)
        q = at["scratch"]
        parts = q + self.scratch(batch, new, splits)[0]
        scale = (self.scale or self.width**-0.5) * LOG2_E
        of_cache = f"{self.cache}_{self.width}"
        whole = batch * self.kv_heads
        return (
            Launch(
                f"append_{of_cache}", (self.heads + 2 * self.kv_heads, new, batch), 32,
                (at["qkv"], at["last"], at.get("cosines", 0), at.get("sines", 0),
                 at.get("query_gain", 0), at.get("key_gain", 0), q, at["keys"], at["values"], new,
                 self.heads, self.kv_heads, capacity, min(capacity, rotations or capacity),
                 self.epsilon, scale),
            ),
            Launch(
                f"attend_{of_cache}", (splits, -(-new * group // QUERIES), whole), 128,
                (q, at["last"], at["keys"], at["values"], parts, new, group, self.kv_heads,
                 capacity, self.window),
            ),
            Launch(
                f"merge_{self.width}", (new * group, whole, 1), self.width,
                (parts, at["y"], new, group, self.kv_heads, splits),
            ),
        )  # fmt: skip


@dataclass(frozen=True, slots=True)
class GroupNorm:
    """Group norm of [batch, channels, pixels], pixels a multiple of 4, with SiLU where wanted."""

    channels: int
    groups: int
    epsilon: float = 1e-5
    silu: bool = True

    def launches(
        self, batch: int, pixels: int, at: Mapping[str, int], multiprocessors: int
    ) -> tuple[Launch, Launch]:
        """Sums, then the norm. `at`: x, gain, shift, y, scratch (64 kB are enough)."""
        whole = batch * self.groups
        count = self.channels // self.groups * pixels
        splits = max(1, min(2 * multiprocessors // whole, count // 4096, 32))
        blocks = max(1, min(pixels // 4096, 16))
        return (
            Launch("moments", (splits, whole, 1), 256, (at["x"], at["scratch"], count)),
            Launch(
                "group_norm", (blocks, batch * self.channels, 1), 256,
                (at["x"], at["scratch"], at["gain"], at["shift"], at["y"], pixels, self.channels,
                 self.groups, splits, int(self.silu), self.epsilon),
            ),
        )  # fmt: skip
