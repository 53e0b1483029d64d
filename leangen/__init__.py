"""leangen: low-precision inference of generative models that accounts for its energy.

import leangen as lg
m = lg.load("smollm2-135m:int4")
r = m.generate("The capital of France is", max_new_tokens=8)
print(r.text, r.receipt.energy.gross_j)
"""

from __future__ import annotations

import gc
import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from leangen.api import load as load
    from leangen.budget import Budget as Budget
    from leangen.engine import Engine as Engine
    from leangen.engine import Result as Result
    from leangen.errors import LeangenError as LeangenError
    from leangen.pipeline import Pipeline as Pipeline
    from leangen.records import Receipt as Receipt
    from leangen.records import Step as Step

# NumPy's and ONNX Runtime's libraries read these once, when they load; your own values stay.
# ONNX Runtime's wheels send usage data to their maker from 1.29 on: not in leangen's name.
os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
# OpenBLAS's threads spin for 2^26 cycles after they start and after each product: 0.1 s of a core
# at every start, most of it within the first generation's window. 2^20 are 0.3 ms.
os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", "20")

__version__ = "0.1.0"
__all__ = ["Budget", "Engine", "LeangenError", "Pipeline", "Receipt", "Result", "Step", "load"]

_HOMES = {
    "load": "leangen.api",
    "Budget": "leangen.budget",
    "Engine": "leangen.engine",
    "Result": "leangen.engine",
    "LeangenError": "leangen.errors",
    "Pipeline": "leangen.pipeline",
    "Receipt": "leangen.records",
    "Step": "leangen.records",
}


def __getattr__(name: str) -> Any:
    # On use, so that reading a ledger or listing the catalog never loads ONNX Runtime.
    if name in _HOMES:
        return getattr(_imported(_HOMES[name]), name)
    raise AttributeError(f"module 'leangen' has no attribute {name!r}")


def _imported(module: str) -> Any:
    """A module, imported without looking for garbage, which takes 10 ms: what imports make stays.

    It is then among the old objects, as if it had been looked at.
    """
    if not gc.isenabled() or gc.get_freeze_count():
        return import_module(module)
    gc.disable()
    try:
        return import_module(module)
    finally:
        gc.freeze()
        gc.unfreeze()
        gc.enable()
