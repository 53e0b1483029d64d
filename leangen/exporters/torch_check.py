"""What a bundle computes, beside what the torch module that it was made of does."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from leangen.bundle import Bundle
from leangen.exporters import torch_flow, torch_image
from leangen.exporters.difference import Difference
from leangen.exporters.torch_module import Made
from leangen.session import Session

ROWS = 5
"""Samples in each comparison: another number than tracing used."""


@dataclass(frozen=True, slots=True)
class Values(Difference):
    """An output of the bundle against that of torch, both in fp32, on one input."""

    input: str
    """`example` or `random`."""
    output: str

    def __str__(self) -> str:
        return (
            f"{self.input}: {self.output} differs from torch by at most {self.largest:.2g} (the "
            f"largest is {self.scale:.3g})"
        )


def differences(made: Made, bundle: Bundle) -> list[Difference]:
    """Run module and bundle on the example and on random inputs of about its size."""
    session = Session(bundle, kernels="ort")
    found = []
    given = [x[torch.arange(ROWS) % len(x)] for x in made.examples]
    with torch.no_grad():
        for name, rows in (("example", given), ("random", _random(made))):
            if made.kind == "flow":
                found += _of_flow(name, made.module, rows[0], session)
            else:
                found.append(_of_graph(name, made, rows, session))
    return found


def _random(made: Made) -> list[torch.Tensor]:
    """Twice as spread as the examples: beyond the bounds of splines too; integers are mixed.

    Where the module takes no values beyond its bounds, they lie among the examples'.
    """
    generator = torch.Generator().manual_seed(0)
    wide, among = [], []
    for x in made.examples:
        drawn = x[torch.randint(len(x), (ROWS,), generator=generator)]
        noise = torch.randn(ROWS, *x.shape[1:], generator=generator)
        if x.is_floating_point():
            spread = 2 * max(float(x.double().std(correction=0)), 0.5)
            wide.append(x.mean() + spread * noise)
            among.append(
                x.min() + (x.max() - x.min()) * torch.rand(noise.shape, generator=generator)
            )
        else:
            wide.append(drawn)
            among.append(drawn)
    try:
        if made.kind == "flow":
            torch_flow.open_flow(made.module, wide[0]).encode(wide[0].clone())
        else:
            made.module(*(x.clone() for x in wide))
    except Exception:  # the user's code says by what it likes that it takes no such values
        return among
    return wide


def _of_flow(
    name: str, module: nn.Module, data: torch.Tensor, session: Session
) -> list[Difference]:
    flow = torch_flow.open_flow(module, data)
    rows = data.flatten(1).numpy()
    log_prob, latent = session.run("log_prob", {"x": rows}, ["log_prob", "latent"])
    expected = flow.encode(data.clone())[0]  # a layer may overwrite what it is given
    back = flow.decode(expected.reshape(ROWS, *flow.latent_shape).clone()).flatten(1)
    sample = session.run("sample", {"latent": expected.flatten(1).numpy()}, ["x"])[0]
    pairs: Mapping[str, tuple[Any, Any]] = {
        "log-density": (flow.log_density(data.clone()), log_prob),
        "latent": (expected.flatten(1), latent),
        "sample": (back, sample),
    }
    return [_difference(name, output, *pair) for output, pair in pairs.items()]


def _of_graph(
    name: str, made: Made, inputs: Sequence[torch.Tensor], session: Session
) -> Difference:
    function = torch_image.as_function(made.module, made.kind, made.options.get("noise_at", 1))
    names = torch_image.input_names(made.module, len(inputs), made.kind)
    feeds = {key: value.numpy() for key, value in zip(names, inputs, strict=True)}
    expected = function(*(x.clone() for x in inputs))
    return _difference(name, "output", expected, session.run("model", feeds)[0])


def _difference(name: str, output: str, expected: torch.Tensor, got: Any) -> Difference:
    """Over the samples that torch itself computes without overflow."""
    wanted, made = (np.asarray(x, np.float64).reshape(len(x), -1) for x in (expected.numpy(), got))
    finite = np.isfinite(wanted).all(axis=1)
    apart = np.nan_to_num(np.abs(made - wanted)[finite], nan=np.inf)
    scale = np.abs(wanted[finite]).max(initial=0.0)
    largest = float(apart.max(initial=0.0))
    return Values(name, output, largest=largest, scale=float(scale))
