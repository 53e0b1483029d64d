"""How weights are rounded: one module per method.

A method is one module with

    NEEDS_DATA    whether it looks at the layer's inputs
    quantize(w, scheme, moment, **options) -> Packed
                  w: float32 [n, k]; scheme: a module of `leangen.schemes`; moment: the layer's
                  second moment, float32 [k, k], mean of x x^T over calibration, or None where
                  the method needs no data; options: the scheme's

and, where it changes the graph before anything is rounded,

    prepare(graph, sites, moments) -> None
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

METHODS = {
    "rtn": "leangen.methods.rtn",
}


def get(name: str) -> ModuleType:
    """The method's module."""
    return import_module(METHODS[name])
