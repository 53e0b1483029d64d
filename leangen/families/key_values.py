"""Keys and values of past tokens: memory that a language model's graph reads and appends to.

Batch is outermost in each layer's tensor, so that neighbouring sequences are bound as they lie: a
run appends in place and copies nothing.
"""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import onnxruntime as ort

from leangen.errors import RequestError
from leangen.families import pages
from leangen.session import Session

Array = np.ndarray[Any, Any]

_TYPES = {
    "tensor(float)": np.float32,
    "tensor(float16)": np.float16,
    "tensor(int8)": np.int8,
}


class KeyValues(Protocol):
    """The keys and values of some sequences, in the memory of the session's device."""

    def bind(self, binding: ort.IOBinding, first: int = 0, stop: int | None = None) -> None:
        """Bind those of the sequences from `first` up to `stop` as past and present."""

    def copy(self, other: Any, positions: int, source: int = 0, target: int = 0) -> None:
        """Take over the first positions of `source` among the `other`'s sequences as `target`."""


def allocate(session: Session, rows: int, capacity: int, role: str = "model") -> KeyValues:
    """Room for `rows` sequences of `capacity` tokens on the session's device.

    Raises MemoryError, OutOfMemoryError for a card.
    """
    if session.device.kind == "cuda":
        return OnCard(session, rows, capacity, role, (session.device.kind, session.device.index))
    return InMemory(session, rows, capacity, role)


def _needed(
    session: Session, rows: int, capacity: int, role: str
) -> tuple[tuple[int, ...], np.dtype[Any]]:
    config = session.bundle.config
    if "io" in config:
        raise RequestError(
            f"{session.bundle.name} wraps a graph of another program, whose cache holds one "
            "sequence and no calibration data: export the model from its own weights instead"
        )
    inputs = session.graph(role).get_inputs()
    kept = next(given for given in inputs if given.name.startswith("past_key_"))
    columns = kept.shape[-1] if isinstance(kept.shape[-1], int) else config["head_dim"]
    shape = (config["layers"], 2, rows, config["kv_heads"], capacity, columns)
    return shape, np.dtype(_TYPES[kept.type])


class InMemory:
    """In the host's memory; a tail or a row that is not used takes none."""

    def __init__(self, session: Session, rows: int, capacity: int, role: str) -> None:
        self.array = pages.zeros(*_needed(session, rows, capacity, role))
        """[layers, 2, rows, kv_heads, capacity, columns], in the numbers that the graph keeps;
        int8 has four more columns than head_dim, for scales."""

    def bind(self, binding: ort.IOBinding, first: int = 0, stop: int | None = None) -> None:
        """As KeyValues."""
        for layer, pair in enumerate(self.array[:, :, first:stop]):
            for kind, part in zip(("key", "value"), pair, strict=True):
                value = ort.OrtValue.ortvalue_from_numpy(part)
                binding.bind_ortvalue_input(f"past_{kind}_{layer}", value)
                binding.bind_ortvalue_output(f"present_{kind}_{layer}", value)

    def copy(self, other: InMemory, positions: int, source: int = 0, target: int = 0) -> None:
        """As KeyValues."""
        self.array[:, :, target, :, :positions] = other.array[:, :, source, :, :positions]


class OnCard:
    """In a card's memory; `memory` is ONNX Runtime's name of a device, and which one."""

    def __init__(
        self, session: Session, rows: int, capacity: int, role: str, memory: tuple[str, int]
    ) -> None:
        (layers, _, *self._shape), self._type = _needed(session, rows, capacity, role)
        self._memory = memory
        names = [f"{kind}_{layer}" for layer in range(layers) for kind in ("key", "value")]
        with session.card_told():
            self._values = {
                name: ort.OrtValue.ortvalue_from_shape_and_type(self._shape, self._type, *memory)
                for name in names
            }

    def bind(self, binding: ort.IOBinding, first: int = 0, stop: int | None = None) -> None:
        """As KeyValues."""
        rows, *one = self._shape
        shape = [len(range(rows)[first:stop]), *one]
        for name, value in self._values.items():
            what = *self._memory, self._type, shape, self._place(value, first, 0)
            binding.bind_input(f"past_{name}", *what)
            binding.bind_output(f"present_{name}", *what)

    def copy(self, other: OnCard, positions: int, source: int = 0, target: int = 0) -> None:
        """As KeyValues."""
        from leangen_kernels.cuda import driver

        _, heads, _, columns = self._shape
        driver.copy_within(
            self._memory[1],
            [
                (self._place(value, target, head), other._place(other._values[name], source, head))
                for name, value in self._values.items()
                for head in range(heads)
            ],
            positions * columns * self._type.itemsize,
        )

    def _place(self, value: ort.OrtValue, row: int, head: int) -> int:
        """The address of a sequence's first key or value in a head."""
        _, heads, capacity, columns = self._shape
        place: int = value.data_ptr()
        return place + (row * heads + head) * capacity * columns * self._type.itemsize


def bind_inputs(binding: ort.IOBinding, **arrays: Array) -> None:
    """Bind arrays as inputs; what is written to one later is what a later run reads."""
    for name, array in arrays.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
