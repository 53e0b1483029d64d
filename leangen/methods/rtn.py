"""Round to nearest, with the scale of least squared error that the scheme's own search finds."""

from __future__ import annotations

from types import ModuleType
from typing import Any

from leangen.schemes import Array, Packed

NEEDS_DATA = False


def quantize(w: Array, scheme: ModuleType, moment: Array | None, **options: Any) -> Packed:
    """Round `w` [n, k]; `moment` is not looked at."""
    packed: Packed = scheme.quantize(w, **options)
    return packed
