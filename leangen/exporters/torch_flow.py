"""Normalizing flows in torch: both directions as graphs of one bundle.

A library is one file with `open_flow(module) -> Flow` and one line in `LIBRARIES`. Any other module
is a flow if it has `forward(x) -> (z, log_det)` and `inverse(z) -> x` (or `(x, log_det)`), over a
standard normal; layers of the libraries may be among its parts. Both directions share the weights
of their networks, which quantization treats alike; a matrix that the flow inverts stays float32
(`/bijection/...`), and so does all that is not a weight: scales, splines, log-determinants, sums.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from leangen.errors import UnsupportedError
from leangen.exporters.onnx_writer import GraphWriter
from leangen.exporters.torch_emitter import ONNX_TYPES, Emitter, layer_weights, value_info
from leangen.exporters.torch_trace import Batch, Trace, trace

LIBRARIES = {
    "nflows": "leangen.exporters.torch_nflows",
    "normflows": "leangen.exporters.torch_normflows",
    "zuko": "leangen.exporters.torch_zuko",
}
"""Modules by the package that a flow's class comes from."""


@dataclass(frozen=True, slots=True)
class Flow:
    """The directions of a flow over a standard normal latent."""

    encode: Callable[[Tensor], tuple[Tensor, Tensor]]
    """Data [n, ...] to the latent [n, ...] and the log-density [n]."""
    decode: Callable[[Tensor], Tensor]
    """Latent [n, *latent_shape] to data."""
    log_density: Callable[[Tensor], Tensor]
    """The library's own, to compare with."""
    latent_shape: tuple[int, ...]
    """Of one sample, as `decode` takes it."""
    traceable: Callable[[], AbstractContextManager[None]] = nullcontext
    """While this context is open, both directions can be traced."""


def is_flow(module: nn.Module) -> bool:
    """Whether it is a flow of a library, or has `inverse`."""
    return _library(module) is not None or callable(getattr(module, "inverse", None))


def _library(module: nn.Module) -> str | None:
    return next((name for name in LIBRARIES if name in _packages(module)), None)


def _packages(module: nn.Module) -> set[str]:
    return {cls.__module__.partition(".")[0] for cls in type(module).__mro__}


def open_flow(module: nn.Module, example: Tensor) -> Flow:
    """The directions of a module; UnsupportedError for what is no flow that can be exported."""
    library = _library(module)
    if library is not None:
        return _checked(import_module(LIBRARIES[library]).open_flow, module, example)
    return _plain(module, example)


def _checked(opened: Callable[[nn.Module], Flow], module: nn.Module, example: Tensor) -> Flow:
    try:
        return opened(module)
    except AttributeError as error:  # of the library, but no flow: a single transform
        raise UnsupportedError(
            f"{type(module).__name__} is not a whole flow ({error}): give the library's flow with "
            "its base distribution"
        ) from None


def _plain(module: nn.Module, example: Tensor) -> Flow:
    made = module(example.clone())
    if not (isinstance(made, tuple) and len(made) == 2 and made[1].shape == example.shape[:1]):
        raise UnsupportedError(
            f"forward of {type(module).__name__} returns {_described(made)}, expected (z, log_det) "
            "with one log-determinant per sample"
        )

    def encode(x: Tensor) -> tuple[Tensor, Tensor]:
        z, log_det = module(x)
        rows = z.flatten(1)
        normal = -0.5 * (rows * rows).sum(1) - 0.5 * rows.shape[1] * math.log(2 * math.pi)
        return z, normal + log_det

    def decode(u: Tensor) -> Tensor:
        made: Any = module.inverse(u)
        data: Tensor = made[0] if isinstance(made, tuple) else made
        return data

    @contextmanager
    def traceable() -> Iterator[None]:
        with ExitStack() as stack:
            for name in LIBRARIES.keys() & set().union(*map(_packages, module.modules())):
                stack.enter_context(import_module(LIBRARIES[name]).traceable())
            yield

    return Flow(encode, decode, lambda x: encode(x)[1], tuple(made[0].shape[1:]), traceable)


def _described(made: Any) -> str:
    if isinstance(made, Tensor):
        return f"a tensor of shape {list(made.shape)}"
    if isinstance(made, tuple):
        return f"({', '.join(_described(part) for part in made)})"
    return f"{type(made).__name__}"


def needs_normal(base: Any) -> UnsupportedError:
    """The error for a base distribution that is not exported."""
    return UnsupportedError(
        f"the flow's base distribution is {type(base).__name__}: only normal ones with a diagonal "
        "covariance are exported"
    )


def write(flow: Flow, module: nn.Module, example: Tensor, folder: Path) -> Mapping[str, str]:
    """Write `log_prob.onnx` (x -> log_prob, latent) and `sample.onnx` (latent -> x); the graphs.

    Rows of both are flat, [n, d]; an image's values stand channel by channel, row by row.
    """
    shape = tuple(example.shape[1:])
    size = math.prod(shape)
    if math.prod(flow.latent_shape) != size:
        raise UnsupportedError(
            f"the flow's latent has {math.prod(flow.latent_shape)} values, the example input "
            f"{size}: give an example that the flow takes"
        )

    def encode(rows: Tensor) -> tuple[Tensor, Tensor]:
        z, log_density = flow.encode(rows.unflatten(1, shape) if len(shape) > 1 else rows)
        return log_density, z.flatten(1)

    def decode(rows: Tensor) -> Tensor:
        latent = flow.latent_shape
        made = flow.decode(rows.unflatten(1, latent) if len(latent) > 1 else rows)
        return made.flatten(1)

    rows = example.flatten(1)
    with flow.traceable():
        there = trace(encode, [rows], module)
        back = trace(decode, [torch.zeros_like(rows)], module)
        shared = layer_weights(there) & layer_weights(back)
        _write(there, folder, "log_prob", "x", ["log_prob", "latent"], size, shared)
        _write(back, folder, "sample", "latent", ["x"], size, shared)
    return {"log_prob": "log_prob.onnx", "sample": "sample.onnx"}


def _write(
    traced: Trace,
    folder: Path,
    stem: str,
    feed: str,
    results: Sequence[str],
    size: int,
    shared: frozenset[str],
) -> None:
    with GraphWriter(folder, stem) as writer:
        made = Emitter(writer, feed, shared).emit(traced, [feed])
        outputs = []
        for name, tensor in zip(results, made, strict=True):
            writer.node("Cast", f"/{name}", [tensor], [name], to=ONNX_TYPES[torch.float32])
            rows = (Batch(1),) if name == "log_prob" else (Batch(1), size)
            outputs.append(value_info(name, torch.float32, rows))
        writer.save([value_info(feed, torch.float32, (Batch(1), size))], outputs)
