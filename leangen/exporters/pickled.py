"""What torch has pickled: read as plain tensors by name, or not at all. Nothing in it is run."""

from __future__ import annotations

import pickle
import zipfile
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from leangen.errors import SourceError, needs

if TYPE_CHECKING:
    import torch

Array = np.ndarray[Any, Any]
_REMEDY = (
    "load it where you trust it and save it with save_pretrained or safetensors.torch.save_file, "
    "which write safetensors"
)


def load(file: Path) -> dict[str, torch.Tensor]:
    """The tensors by name, mapped into memory where the file is not of torch before 1.6.

    Raises SourceError for a damaged file and for one that holds anything else, DependencyError
    without torch.
    """
    message = f"{file} is pickled, which takes torch to read: `pip install 'leangen[export]'`"
    with needs("torch", message=message):
        import torch
    try:
        mapped = zipfile.is_zipfile(file)
        state = torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # what is damaged or no pickle at all fails in any way
        raise SourceError(
            f"{file} is pickled and torch refuses to load it as weights only "
            f"({_told(error)}): {_REMEDY}"
        ) from error
    if not isinstance(state, dict) or not all(map(_is_plain, state.values())):
        raise SourceError(f"{file} holds more than tensors by name: {_REMEDY}")
    return {str(name): tensor.detach() for name, tensor in state.items()}


def _told(error: Exception) -> str:
    """What was wrong, without torch's advice to load it all the same."""
    if not isinstance(error, pickle.UnpicklingError | RuntimeError | OSError):
        return "it is damaged, or nothing that torch.save wrote"
    said = str(error).rpartition("WeightsUnpickler error:")[2].strip()
    return said.partition("\n")[0].partition(". ")[0]


def _is_plain(value: Any) -> bool:
    import torch

    return isinstance(value, torch.Tensor) and value.layout == torch.strided


class Opened:
    """The tensors of a pickle as NumPy arrays, by the methods of an open safetensors file."""

    def __init__(self, file: Path) -> None:
        self._state = load(file)

    def keys(self) -> Iterable[str]:
        """The tensors' names."""
        return self._state.keys()

    def get_slice(self, name: str) -> _Described:
        """A tensor's shape and type."""
        return _Described(self._state[name])

    def get_tensor(self, name: str) -> Array:
        """A tensor; bfloat16 is that of ml_dtypes."""
        import ml_dtypes
        import torch

        tensor = self._state[name]
        if tensor.dtype == torch.bfloat16:  # NumPy's own types have none
            return np.asarray(tensor.view(torch.int16)).view(ml_dtypes.bfloat16)
        return np.asarray(tensor)


class _Described:
    def __init__(self, tensor: torch.Tensor) -> None:
        self._tensor = tensor

    def get_shape(self) -> list[int]:
        return list(self._tensor.shape)

    def get_dtype(self) -> str:
        """As safetensors calls it, for numbers with a point."""
        name = str(self._tensor.dtype).removeprefix("torch.")
        known = {"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16"}
        return known.get(name, name)
