"""Keys and values of past tokens: memory that a language model's graph reads and appends to."""

from __future__ import annotations

from typing import Any

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


def allocate(session: Session, rows: int, capacity: int, role: str = "model") -> Array:
    """Room for `rows` sequences of `capacity` tokens, in the numbers that the graph keeps.

    [layers, 2, rows, kv_heads, capacity, columns]; int8 has four more columns than head_dim, for
    scales. A tail or a row that is not used takes no memory.
    """
    return pages.zeros(*_needed(session, rows, capacity, role))


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


class OnCard:
    """The same for one sequence in a card's memory, where a run appends without copies.

    `memory` is ONNX Runtime's name of a device, and which one.
    """

    def __init__(self, session: Session, capacity: int, role: str, memory: tuple[str, int]) -> None:
        shape, kind = _needed(session, 1, capacity, role)
        names = [f"{which}_{layer}" for layer in range(shape[0]) for which in ("key", "value")]
        with session.card_told():
            self.values = {
                name: ort.OrtValue.ortvalue_from_shape_and_type(shape[2:], kind, *memory)
                for name in names
            }

    def bind(self, binding: ort.IOBinding) -> None:
        """Bind each layer's keys and values as past and present."""
        for name, value in self.values.items():
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)

    def copy(self, other: OnCard, length: int) -> None:
        """Take over the other's first `length` positions, through the host's memory."""
        for name, value in self.values.items():
            mine = value.numpy()
            mine[..., :length, :] = other.values[name].numpy()[..., :length, :]
            value.update_inplace(mine)


def bind_inputs(binding: ort.IOBinding, **arrays: Array) -> None:
    """Bind arrays as inputs; what is written to one later is what a later run reads."""
    for name, array in arrays.items():
        binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))


def bind(binding: ort.IOBinding, caches: Array) -> None:
    """Bind each layer's keys and values as past and present, so that a run appends in place."""
    for layer, pair in enumerate(caches):
        for kind, cache in zip(("key", "value"), pair, strict=True):
            value = ort.OrtValue.ortvalue_from_numpy(cache)
            binding.bind_ortvalue_input(f"past_{kind}_{layer}", value)
            binding.bind_ortvalue_output(f"present_{kind}_{layer}", value)
