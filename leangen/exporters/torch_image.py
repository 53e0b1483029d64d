"""Decoders, encoders and denoisers in torch: `forward` as one ONNX graph."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from leangen.errors import SourceError, UnsupportedError
from leangen.exporters.onnx_file import SIGMA_NAMES
from leangen.exporters.onnx_writer import GraphWriter
from leangen.exporters.torch_emitter import ONNX_TYPES, Emitter, value_info
from leangen.exporters.torch_module import running
from leangen.exporters.torch_trace import trace


def write(
    module: nn.Module, examples: Sequence[Tensor], kind: str, folder: Path, options: dict[str, Any]
) -> str:
    """Write `model.onnx` and put what follows from `kind` into `options`; the bundle's family.

    The inputs get the names by which `onnx_file` knows them; conditions keep those of `forward`.
    """
    names = input_names(module, len(examples), kind)
    if kind == "velocity":
        options.setdefault("prediction", "flow")
        options.setdefault("scale", 1.0)
    function = as_function(module, kind, options.pop("noise_at", 1))
    with running(module, examples):
        made = tree_flatten(function(*(x.clone() for x in examples)))[0]
    if not made or not isinstance(made[0], Tensor):
        raise SourceError(
            f"forward of {type(module).__name__} returns no tensor: expected the {_RESULTS[kind]}"
        )
    if kind == "encoder":
        options["encoder"] = True
    elif made[0].dim() != 4:
        raise UnsupportedError(
            f"forward of {type(module).__name__} returns shape {list(made[0].shape)}, expected "
            f"{_RESULTS[kind]} [n, c, h, w]"
        )
    traced = trace(function, examples, module)
    with GraphWriter(folder) as writer:
        result = Emitter(writer, names[0]).emit(traced, names)[0]
        writer.node("Cast", "/output", [result], ["output"], to=ONNX_TYPES[torch.float32])
        writer.save(
            [value_info(n, v.dtype, v.shape) for n, v in zip(names, traced.inputs, strict=True)],
            [value_info("output", torch.float32, traced.outputs[0].shape)],
        )
    return "oneshot" if kind in ("decoder", "encoder") else "diffusion"


_RESULTS = {
    "decoder": "image",
    "encoder": "latent",
    "denoiser": "prediction",
    "velocity": "velocity",
}


def as_function(module: nn.Module, kind: str, noise_at: float = 1) -> Any:
    """What the graph computes: `forward`, its first result alone, noise being at time 1."""
    if noise_at not in (0, 1):
        raise SourceError(
            f"noise_at is {noise_at!r}, expected 0 or 1: the time at which x is noise"
        )
    if kind == "velocity" and noise_at == 0:
        return lambda x, t, *conditions: -_first(module(x, 1 - t, *conditions))
    return lambda *inputs: _first(module(*inputs))


def _first(made: Any) -> Any:
    return tree_flatten(made)[0][0] if not isinstance(made, Tensor) else made


def input_names(module: nn.Module, count: int, kind: str) -> list[str]:
    """The names of the graph's inputs."""
    parameters: Mapping[str, Any] = inspect.signature(module.forward).parameters
    given = list(parameters)[:count]
    given += [f"input{i}" for i in range(len(given), count)]
    if kind in ("denoiser", "velocity"):
        if count < 2:
            raise SourceError(f"a {kind} takes (x, level, ...): the example has {count} input")
        level = "sigma" if given[1].lower() in SIGMA_NAMES and kind == "denoiser" else "t"
        return ["x", level, *given[2:]]
    return ["image" if kind == "encoder" else "z", *given[1:]]
