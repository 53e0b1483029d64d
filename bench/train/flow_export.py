"""A trained flow as the file that a package keeps, and what it does in float32."""

from __future__ import annotations

import hashlib
import io
import lzma
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leangen import probe
from leangen.bundle import Bundle, add_file
from leangen.console import say
from leangen.exporters import torch_flow, torch_module
from leangen.families import density
from leangen.session import Session

DRAWS, COMPARED = 10_000, 500
"""Draws that must be finite and inverted to themselves; those compared with float64."""
PROBED = 8
"""Rows of the probe, whose references are kept with the model."""


def frozen(model: nn.Module) -> None:
    """Round the weights to fp16, as they are kept, and let no layer depend on training any more."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    for layer in model.modules():
        if hasattr(layer, "freeze"):
            layer.freeze()
    model.eval().requires_grad_(False)


def mean_and_error(values: Tensor) -> dict[str, float]:
    """The mean of independent values and its standard error."""
    error = float(values.double().std()) / len(values) ** 0.5
    return {"mean": round(float(values.double().mean()), 5), "standard_error": round(error, 5)}


def export(
    model: nn.Module, example: Tensor, folder: Path, name: str, options: dict[str, Any]
) -> dict[str, Any]:
    """Write `NAME.tar.xz`, a bundle of both directions; how exact it is in float32.

    Its probe holds what torch computes in float64.
    """
    made = torch_module.Made(model.cpu(), (example.cpu(),), "flow", dict(options))
    bundle = torch_module.write(made, folder / name, name=name, source={}, replace=True)
    judged = _judge(bundle, model, example)
    bundle = _with_reference(bundle, model, example)
    packed = pack(bundle)
    (folder / f"{name}.tar.xz").write_bytes(packed)
    say(f"{name}.tar.xz: {len(packed)} bytes, sha256 {hashlib.sha256(packed).hexdigest()}")
    return {"draws_float32": judged, "packed_bytes": len(packed)}


def pack(bundle: Bundle) -> bytes:
    """The bundle's folder as a compressed archive, the same bytes each time."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for path in sorted(path for path in bundle.path.rglob("*") if path.is_file()):
            member = tarfile.TarInfo(path.relative_to(bundle.path).as_posix())
            member.size, member.mode = path.stat().st_size, 0o644
            archive.addfile(member, io.BytesIO(path.read_bytes()))
    # Both directions hold the same weights: they are stored once if the dictionary spans them.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "dict_size": 1 << 26}]
    return lzma.compress(buffer.getvalue(), filters=filters)


def _exact(model: nn.Module, example: Tensor) -> torch_flow.Flow:
    """The flow in float64, of rows."""
    return torch_flow.open_flow(model.double(), example.double())


def _judge(bundle: Bundle, model: nn.Module, example: Tensor) -> dict[str, Any]:
    """Draws of the exported graphs, and their densities beside torch's in float64."""
    session = Session(bundle, kernels="ort", threads=1)
    worst, apart, size, finite, compared = 0.0, 0.0, 0.0, 0, 0
    flow = _exact(model, example)
    for latent in density.latents(session, DRAWS, seed=1):
        (rows,) = session.run("sample", {"latent": latent}, ["x"])
        found, back = session.run("log_prob", {"x": rows}, ["log_prob", "latent"])
        finite += int(np.isfinite(rows).all(1).sum())
        if compared < COMPARED:
            first = torch.from_numpy(rows[: COMPARED - compared]).double()
            exact = flow.encode(first.unflatten(1, example.shape[1:]))[1].numpy()
            worst = max(worst, float(np.abs(found[: len(exact)] - exact).max()))
            size, compared = size + float(np.abs(exact).sum()), compared + len(exact)
        (again,) = session.run("sample", {"latent": back}, ["x"])
        apart = max(apart, float(np.abs(again - rows).max()))
    model.float()
    return {
        "draws": DRAWS,
        "finite": finite,
        "compared_with_float64": compared,
        "mean_size_of_log_density_nats": round(size / compared, 3),
        "worst_error_of_log_density_nats": float(f"{worst:.2g}"),
        "worst_value_apart_after_inversion": float(f"{apart:.2g}"),
    }


def _with_reference(bundle: Bundle, model: nn.Module, example: Tensor) -> Bundle:
    """The bundle with a probe whose references torch computed in float64."""
    inputs = probe.inputs(bundle, PROBED)
    flow = _exact(model, example)
    rows = torch.from_numpy(inputs["log_prob"]["x"]).double()
    z, log_density = flow.encode(rows.unflatten(1, example.shape[1:]))
    latent = torch.from_numpy(inputs["sample"]["latent"]).double()
    made = flow.decode(latent.unflatten(1, flow.latent_shape)).flatten(1)
    model.float()
    outputs = {
        "log_prob": {"log_prob": log_density, "latent": z.flatten(1)},
        "sample": {"x": made},
    }
    runs = {
        role: (inputs[role], {name: value.float().numpy() for name, value in named.items()})
        for role, named in outputs.items()
    }
    return add_file(bundle, probe.FILE, probe.content(runs, dict.fromkeys(runs, 0.0)))
