"""The tensors that torch has saved in a folder, read one at a time; pickles only as plain data."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from leangen.errors import SourceError
from leangen.exporters import pickled

Array = np.ndarray[Any, Any]
_MOST_NAMED = 8
_FORMER = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What the autoencoder's attention was called before diffusers 0.17, and is now."""


class StoredTensors:
    """The tensors of a folder's safetensors files, or of its pickles if torch loads them safely.

    Raises SourceError where there are none, for damaged files and for pickles that hold code.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files = weight_files(folder)
        self._read: dict[str, Callable[[], torch.Tensor]] = {}
        self._shapes: dict[str, tuple[int, ...]] = {}
        for file in self.files:
            if file.suffix == ".safetensors":
                self._open_safetensors(file)
            else:
                self._open_pickle(file)

    def check(self, state: Mapping[str, torch.Tensor]) -> None:
        """SourceError listing what a module's state needs that is missing or of another shape.

        A tensor that stands for several names may be stored under any of them.
        """
        wrong = []
        for name, tensor in state.items():
            stored = self._stored(name)
            if stored is None:
                if not any(self._stored(twin) for twin in _twins(name, state)):
                    wrong.append(f"{name} is missing")
            elif self._shapes[stored] != tuple(tensor.shape):
                found, wanted = list(self._shapes[stored]), list(tensor.shape)
                wrong.append(f"{name} is {found}, expected {wanted}")
        if wrong:
            more = f" and {len(wrong) - _MOST_NAMED} more" if len(wrong) > _MOST_NAMED else ""
            raise SourceError(
                f"{self.folder} does not fit its own config.json: "
                f"{'; '.join(wrong[:_MOST_NAMED])}{more}; download or save it again"
            )

    def array(self, name: str, state: Mapping[str, torch.Tensor]) -> Array:
        """A tensor of a module's state as fp32 (whole numbers as they are)."""
        names = [name, *_twins(name, state)]
        stored = next(found for found in map(self._stored, names) if found is not None)
        tensor = self._read[stored]()
        array: Array = (tensor.float() if tensor.is_floating_point() else tensor).numpy()
        return array

    def has(self, name: str) -> bool:
        """Whether a tensor is stored under this name, or the one that it had before."""
        return self._stored(name) is not None

    def _stored(self, name: str) -> str | None:
        if name in self._read:
            return name
        for former, now in _FORMER.items():
            older = name.replace(f".{now}.", f".{former}.")
            if older != name and older in self._read:
                return older
        return None

    def _open_safetensors(self, file: Path) -> None:
        from safetensors import SafetensorError, safe_open

        try:
            opened: Any = safe_open(file, framework="pt")
        except (SafetensorError, OSError) as error:
            raise SourceError(
                f"{file} is truncated or damaged ({error}): download it again"
            ) from error
        for name in opened.keys():  # noqa: SIM118  it is no mapping
            self._shapes[name] = tuple(opened.get_slice(name).get_shape())
            self._read[name] = partial(opened.get_tensor, name)

    def _open_pickle(self, file: Path) -> None:
        state = pickled.load(file)
        for name, tensor in state.items():
            self._shapes[name] = tuple(tensor.shape)
            self._read[name] = partial(state.__getitem__, name)


def _twins(name: str, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Other names of the very same parameter: T5's embedding has two."""
    return [other for other, tensor in state.items() if tensor is state[name] and other != name]


def weight_files(folder: Path) -> list[Path]:
    """The files with the weights, of one variant: fp32 where there are several."""
    for suffix in ("safetensors", "bin"):
        index = sorted(folder.glob(f"*.{suffix}.index.json"), key=lambda path: len(path.name))
        if index:
            return _indexed(index[0])
        found = sorted(folder.glob(f"*.{suffix}"), key=lambda path: len(path.name))
        if found:
            return found[:1]
    raise SourceError(
        f"{folder} holds no *.safetensors: expected a folder that save_pretrained wrote"
    )


def _indexed(index: Path) -> list[Path]:
    try:
        names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise SourceError(f"cannot read {index}: {error}") from error
    files = [index.parent / Path(name).name for name in names]
    for file in files:
        if not file.is_file():
            raise SourceError(f"{file} is missing, which {index.name} names: download it again")
    return files
