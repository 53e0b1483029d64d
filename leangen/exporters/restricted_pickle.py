"""Reads a pickle whose globals are all on a closed list, and runs nothing else.

A pickle is a program: each global that it names can be called with arguments of its choice. This
reader resolves only NumPy's array reconstruction and the stand-ins that the caller gives; any
other name is an error before anything is called.
"""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from leangen.errors import SourceError

Global = tuple[str, str]
"""(module, name) as a pickle spells it."""

NUMPY_GLOBALS: frozenset[Global] = frozenset(
    {
        ("numpy", "ndarray"),
        ("numpy", "dtype"),
        ("numpy.core.multiarray", "_reconstruct"),  # written by NumPy 1
        ("numpy._core.multiarray", "_reconstruct"),  # written by NumPy 2
    }
)

# What a damaged or hostile pickle makes the C reader raise. The list in the standard library's
# documentation is open-ended ("not necessarily limited to"); these are the ones it can reach here.
_READ_ERRORS = (
    pickle.UnpicklingError,
    EOFError,
    ValueError,
    TypeError,
    AttributeError,
    IndexError,
    KeyError,
    ImportError,
    MemoryError,
    OverflowError,
    RecursionError,
)


class _Refused(Exception):
    """A global outside the list; carries its name past the C reader unchanged."""


class _Reader(pickle.Unpickler):
    def __init__(self, file: Any, stand_ins: Mapping[Global, Any]) -> None:
        super().__init__(file)
        self._stand_ins = stand_ins

    def find_class(self, module: str, name: str) -> Any:
        """The object for a global of the pickle: a stand-in, NumPy's own, or a refusal."""
        if (module, name) in self._stand_ins:
            return self._stand_ins[module, name]
        if (module, name) in NUMPY_GLOBALS:
            return getattr(import_module(module.replace("numpy.core.", "numpy._core.")), name)
        raise _Refused(f"{module}.{name}")


def read(path: Path, stand_ins: Mapping[Global, Any] | None = None) -> Any:
    """The object pickled in `path`, built from plain types, NumPy arrays and `stand_ins` only.

    `stand_ins` maps a (module, name) to what takes its place, so that a file that mentions a
    class need not have it installed. Raises SourceError for any other global (naming it), and for
    a file that is missing, truncated or not a pickle.
    """
    try:
        with path.open("rb") as file:
            return _Reader(file, stand_ins or {}).load()
    except _Refused as refused:
        raise SourceError(
            f"{path} asks for the global {refused}, which is not on the closed list of a safe "
            "pickle: refused, nothing was run; get the file from its publisher again"
        ) from None
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except _READ_ERRORS as error:
        raise SourceError(
            f"{path} is not a readable pickle ({type(error).__name__}: {error}): "
            "it may be truncated; download it again"
        ) from error
