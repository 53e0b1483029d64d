"""Round to nearest, with scales that are kindest to the inputs that are largest.

The error of a weight counts by the mean square of its input, as llama.cpp's importance matrix has
it: the diagonal of the layer's second moment.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from leangen.schemes import Array, Packed

NEEDS_DATA = True


def quantize(w: Array, scheme: ModuleType, moment: Array, **options: Any) -> Packed:
    """Round `w` [n, k] by the diagonal of `moment` [k, k]."""
    packed: Packed = scheme.quantize(w, importance=np.diagonal(moment), **options)
    return packed
