"""How the weights of linear layers are rounded: one module per method.

A method is one module with

    NEEDS_DATA    whether it looks at the layer's inputs
    quantize(w, scheme, moment, **options) -> Packed
                  w: float32 [n, k]; scheme: a module of `leangen.schemes`; moment: the second
                  moment of the layer's inputs, float32 [k, k], the mean of x x^T over calibration
                  data (None for a method that needs no data); options: the scheme's

and, where it changes the graph before anything is rounded,

    prepare(graph, sites, moments, trial) -> None

What a layer's output loses is measured as the mean of |W x - Q x|^2 over the data, which the
moment H alone gives: tr((W - Q) H (W - Q)^T).
"""

from __future__ import annotations

from importlib import import_module
from types import ModuleType

import numpy as np

from leangen.schemes import Array

SCHEMES = ("int4", "int3", "int2")
"""The schemes that methods other than rounding to nearest are for."""
METHODS = {
    "rtn": "leangen.methods.rtn",
    "imatrix": "leangen.methods.imatrix",
    "gptq": "leangen.methods.gptq",
    "awq": "leangen.methods.awq",
    "hqq": "leangen.methods.hqq",
}


def get(name: str) -> ModuleType:
    """The method's module."""
    return import_module(METHODS[name])


def name(method: ModuleType) -> str:
    """What a method's module is called in `METHODS`."""
    return method.__name__.rpartition(".")[2]


def output_loss(error: Array, moment: Array) -> Array:
    """Mean squared error of each output [n], for a weight error [n, k]."""
    loss: Array = np.einsum("nk,nk->n", error @ moment, error)
    return loss
