"""Exports a flow saved by pzflow (Crenshaw et al., arXiv:2405.04740) to a bundle.

The file is a pickle: it is read by `restricted_pickle`, never loaded. Chains of ShiftBounds,
StandardScaler, Scale, Roll, Reverse and (rolling) NeuralSplineCoupling are understood, over a
uniform or a normal latent; conditional flows and dequantizers are not.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import restricted_pickle
from leangen.exporters.graph_writer import Array
from leangen.exporters.spline_graph import (
    Affine,
    Coupling,
    Permute,
    Transform,
    log_prob_model,
    sample_model,
)

# Error models are functions of pzflow that inference does not use.
STAND_INS = {("pzflow.utils", "gaussian_error_model"): None}


def accepts(path: Path) -> bool:
    """Whether the name is that of a pzflow file: `*.pzflow.pkl`."""
    return path.name.endswith(".pzflow.pkl")


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Write the bundle of a pzflow file: `log_prob.onnx` and `sample.onnx`, fp32 conditioners.

    Raises SourceError for a file that is not a pzflow flow, UnsupportedError for a flow that uses
    something else than this module's list, StorageError for the disk.
    """
    state = restricted_pickle.read(path, STAND_INS)
    try:
        columns, latent, bound, transforms = _parse(state, path)
    except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path} is not a complete pzflow flow ({type(error).__name__}: {error}): expected "
            "the state that Flow.save writes; save the flow again"
        ) from error
    dim = len(columns)
    with create(out, replace=replace) as draft:
        onnx.save(log_prob_model(transforms, dim, latent, bound), draft.folder / "log_prob.onnx")
        onnx.save(sample_model(transforms, dim), draft.folder / "sample.onnx")
        draft.name = name or path.name.removesuffix(".pkl").removesuffix(".pzflow")
        draft.family = "flow"
        draft.graphs = {"log_prob": "log_prob.onnx", "sample": "sample.onnx"}
        draft.config = {
            "task": "density",
            "columns": columns,
            "latent": {"kind": latent, "bound": bound},
        }
        draft.source = {"kind": "pzflow", "sha256": sha256_file(path), **(source or {})}
    return open_bundle(out)


def _parse(
    state: Any, path: Path
) -> tuple[list[str], Literal["uniform", "normal"], float, list[Transform]]:
    """Columns, latent kind and bound, and the transforms from data to latent."""
    if not isinstance(state, dict) or "bijector_info" not in state:
        raise SourceError(
            f"{path} holds {type(state).__name__}, not a pzflow flow: expected a file that "
            "Flow.save wrote"
        )
    if state["class"] != "Flow" or state["conditional_columns"] is not None:
        raise UnsupportedError(
            f"{path} is a conditional flow or an ensemble ({state['class']}): only a plain "
            "unconditional pzflow Flow can be exported"
        )
    columns = [str(column) for column in state["data_columns"]]
    kind, arguments = state["latent_info"]
    if kind not in ("Uniform", "Normal") or arguments[0] != len(columns):
        raise UnsupportedError(
            f"{path} has latent {kind}{tuple(arguments)!r}: expected Uniform or Normal over "
            f"{len(columns)} columns"
        )
    transforms = list(_flatten(state["bijector_info"], state["params"][1], len(columns), path))
    bound = float(arguments[1]) if kind == "Uniform" else 1.0
    return columns, "uniform" if kind == "Uniform" else "normal", bound, transforms


def _flatten(info: Any, params: Any, dim: int, path: Path) -> Iterator[Transform]:
    """The transforms of a bijector, nested chains opened."""
    kind, arguments = info
    if kind == "Chain":
        for part, part_params in zip(arguments, params, strict=True):
            yield from _flatten(part, part_params, dim, path)
    elif kind == "ShiftBounds":
        low, high, bound = arguments
        low, high = np.asarray(low), np.asarray(high)
        # pzflow forms these two in the file's own precision, then maps the data
        mean, half_range = (high + low) / 2, (high - low) / 2
        yield _affine(bound / half_range.astype(np.float64), mean, dim)
    elif kind == "StandardScaler":
        means, stds = arguments
        yield _affine(1 / np.asarray(stds, np.float64), np.asarray(means), dim)
    elif kind == "Scale":
        yield _affine(np.asarray(arguments[0], np.float64), np.zeros(1), dim)
    elif kind == "Roll":
        yield Permute(tuple(np.roll(np.arange(dim), arguments[0]).tolist()))
    elif kind == "Reverse":
        yield Permute(tuple(range(dim))[::-1])
    elif kind == "NeuralSplineCoupling":
        yield _coupling(arguments, params, dim, path)
    else:
        raise UnsupportedError(
            f"{path} uses the bijector {kind}, which leangen cannot export: it knows ShiftBounds, "
            "StandardScaler, Scale, Roll, Reverse, NeuralSplineCoupling and chains of them"
        )


def _affine(scale: Array, mean: Array, dim: int) -> Affine:
    """(x - mean) * scale, over `dim` columns."""
    return Affine(
        np.broadcast_to(scale, dim), np.broadcast_to(-mean.astype(np.float64) * scale, dim)
    )


def _coupling(arguments: Any, params: Any, dim: int, path: Path) -> Coupling:
    bins, bound, _, _, transformed, conditions, periodic = arguments
    if conditions or periodic:
        raise UnsupportedError(
            f"{path} has a spline coupling with {conditions} conditions, periodic {periodic}: "
            "only unconditional, non-periodic couplings can be exported"
        )
    upper = dim // 2 if transformed is None else dim - transformed
    layers = tuple(
        (np.asarray(layer[0], np.float32), np.asarray(layer[1], np.float32))
        for layer in params
        if len(layer)  # activations have no parameters
    )
    width = upper
    for weight, bias in layers:
        if weight.shape != (width, *bias.shape):
            raise SourceError(
                f"{path}: a dense layer of shape {weight.shape} with bias {bias.shape} follows "
                f"{width} values: the file is damaged, download it again"
            )
        if not (np.isfinite(weight).all() and np.isfinite(bias).all()):
            raise SourceError(f"{path} holds weights that are not finite: download it again")
        width = bias.size
    if width != (dim - upper) * (3 * bins - 1):
        raise SourceError(
            f"{path}: a conditioner ends in {width} values, its splines need "
            f"{(dim - upper) * (3 * bins - 1)}: the file is damaged, download it again"
        )
    return Coupling(upper, dim - upper, int(bins), float(bound), layers)
