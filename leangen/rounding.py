"""How the weights of a model's linear layers are rounded: the method, what it looks at, and memory.

A method that looks at data takes seconds to minutes a layer. So what it made is kept: in memory
while a model is tuned, on disk while one is quantized, where the next run finds it if this one is
killed.
"""

from __future__ import annotations

import hashlib
import shutil
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from leangen import methods, schemes
from leangen.errors import StorageError
from leangen.files import atomic_file
from leangen.graph_edit import Array
from leangen.moments import Moments
from leangen.precision import Precision
from leangen.schemes import Packed
from leangen.sites import Site
from leangen.treatments.weights import masked

MOST_BITS = 4
"""Codes of more bits are rounded to the nearest by every method."""


class Kept(Protocol):
    """Packed weights by a name that says how they came about: a dict, or a `Folder`."""

    def get(self, key: str) -> Packed | None:
        """What was kept under a key, or None."""

    def __setitem__(self, key: str, packed: Packed) -> None: ...


class Rounder:
    """Makes the codes of linear layers by a method; `leangen.treatments` calls it.

    `moments` are None for a method that looks at no data, and where there is none. `kept` holds
    what was made before, by layer, scheme and options.
    """

    def __init__(
        self,
        method: ModuleType,
        moments: Moments | None,
        kept: Kept | None = None,
    ) -> None:
        self._method = method
        self._moments = moments
        self._kept: Kept = {} if kept is None else kept

    def __call__(
        self, site: Site, w: Array, scheme: ModuleType, options: Mapping[str, Any]
    ) -> Packed:
        """Codes of `w` [n, k]: by the method where bits are few, else to the nearest."""
        packed: Packed | None
        # What a `matrix` is multiplied with is not seen.
        blind = self._method.NEEDS_DATA and (self._moments is None or site.kind == "matrix")
        if scheme.BITS > MOST_BITS or blind or masked(w):
            packed = scheme.quantize(w, **options)
        elif self._moments is None or not self._method.NEEDS_DATA:
            packed = self._method.quantize(w, scheme, None, **options)
        else:
            told = " ".join(f"{name}={value}" for name, value in sorted(options.items()))
            content = zlib.crc32(np.ascontiguousarray(w).data)
            key = f"{site.weight} {content:x} {scheme.__name__} {told}"
            packed = self._kept.get(key)
            if packed is None:
                moment = self._moments[site.node.input[0]]
                packed = self._method.quantize(w, scheme, moment, **options)
                self._kept[key] = packed
        assert packed is not None
        return packed


def trial(precision: Precision, site: Site, w: Array, importance: Array) -> Array:
    """A layer's weight as rounding would leave it, for methods that try."""
    scheme = schemes.get(precision.scheme)
    packed = scheme.quantize(
        w,
        block_size=precision.group or scheme.BLOCK,
        asymmetric=precision.asymmetric,
        importance=importance,
    )
    back: Array = scheme.dequantize(packed)
    return back


def method_of(precision: Precision, usual: str) -> ModuleType:
    """The method that a precision names, else the usual one where bits are few, else rounding."""
    few = precision.scheme in methods.SCHEMES
    return methods.get(precision.method or (usual if few else "rtn"))


class Folder:
    """Packed weights in a folder, each written whole; a damaged one counts as missing."""

    def __init__(self, path: Path) -> None:
        self.path = path

    @classmethod
    def beside(cls, out: Path, identity: str) -> Folder:
        """The folder for making `out` of what `identity` names; others of `out` are removed."""
        name = hashlib.sha256(identity.encode()).hexdigest()[:16]
        folder = cls(out.parent / f".{out.name}.tmp-rounded-{name}")
        for other in out.parent.glob(f".{out.name}.tmp-rounded-*"):
            if other != folder.path:
                shutil.rmtree(other, ignore_errors=True)
        return folder

    def discard(self) -> None:
        """Remove the folder."""
        shutil.rmtree(self.path, ignore_errors=True)

    def get(self, key: str) -> Packed | None:
        """What was kept under a key, or None."""
        try:
            with np.load(self._file(key), allow_pickle=False) as held:
                scheme, n, k, bits, size = held["form"].tolist()
                zeros = held["zero_points"] if "zero_points" in held.files else None
                q, scales = held["q"], held["scales"]
        except (OSError, ValueError, EOFError, KeyError, zipfile.BadZipFile):
            return None
        return Packed(scheme, (int(n), int(k)), int(bits), int(size), q, scales, zeros)

    def __setitem__(self, key: str, packed: Packed) -> None:
        form = [packed.scheme, *packed.shape, packed.bits, packed.block_size]
        arrays = {"form": np.array([str(part) for part in form])}
        arrays |= {"q": packed.q, "scales": packed.scales}
        if packed.zero_points is not None:
            arrays["zero_points"] = packed.zero_points
        try:
            self.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise StorageError(f"cannot write {self.path}: {error.strerror}") from error
        with atomic_file(self._file(key)) as file:
            np.savez(file, allow_pickle=False, **arrays)

    def _file(self, key: str) -> Path:
        return self.path / f"{hashlib.sha256(key.encode()).hexdigest()[:32]}.npz"
