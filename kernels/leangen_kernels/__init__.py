"""Kernels for low-bit inference on CPUs, as an ONNX Runtime custom-op library.

    options = onnxruntime.SessionOptions()
    options.register_custom_ops_library(str(leangen_kernels.library()))

Operators are in the domain `leangen`; `layout` packs weights for them. The library is compiled when
the package is installed, unless with LEANGEN_BUILD_KERNELS=0 (see `build`); it needs neither Numba
nor Python to run.
LEANGEN_KERNELS forces a variant (avx512, avxvnni, avx2, neon, portable) or says `off`.
"""

from __future__ import annotations

import ctypes
import functools
import os
from pathlib import Path

_FOLDER = Path(__file__).parent
_LIBRARY = _FOLDER / "libleangen_kernels.so"
_WHY_NOT = _FOLDER / "libleangen_kernels.txt"
"""Written by the installation when it could not build the library."""


def library() -> Path | None:
    """The shared library to register with ONNX Runtime; None where `status` names no variant."""
    variant, _ = status()
    return None if variant is None else _LIBRARY


def status() -> tuple[str | None, str]:
    """The variant in use, or None, and the reason in words that tell what to change."""
    if os.environ.get("LEANGEN_KERNELS") == "off":
        return None, "switched off by LEANGEN_KERNELS=off"
    if not _LIBRARY.exists():
        why = "it was not built; `pip install` builds it unless LEANGEN_BUILD_KERNELS is 0"
        if _WHY_NOT.exists():
            why = _WHY_NOT.read_text(encoding="utf-8").strip()
        return None, f"no kernel library: {why}"
    return _chosen()


@functools.cache
def _chosen() -> tuple[str | None, str]:
    try:
        native = ctypes.CDLL(str(_LIBRARY))
        native.leangen_kernels_variant.restype = ctypes.c_char_p
    except (OSError, AttributeError) as error:
        return None, f"the kernel library does not load: {error}"
    reason = ctypes.c_char_p()
    variant = native.leangen_kernels_variant(ctypes.byref(reason))
    return variant and variant.decode(), (reason.value or b"").decode()
