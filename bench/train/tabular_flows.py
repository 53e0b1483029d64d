"""Train the catalog's table flows: `python bench/train/tabular_flows.py --kind maf -o DIR`

Densities of seven properties of 100,000 simulated galaxies (pzflow's example data), 10,000 of them
held out: RealNVP (Dinh et al. 2017), a masked autoregressive flow (Papamakarios et al. 2017) and an
autoregressive neural spline flow (Durkan et al. 2019), built with zuko.
"""

from __future__ import annotations

import argparse
import math
from functools import partial
from pathlib import Path

import numpy as np
import torch
import zuko
from flow_export import export, frozen, mean_and_error
from shared import DEVICE, batches, parameters, train, write_card
from torch import Tensor, nn

from leangen.exporters import restricted_pickle
from leangen.store import Store

BATCH, RATE, HELD_OUT = 512, 1e-3, 10_000
COLUMNS = ("redshift", "u", "g", "r", "i", "z", "y")
STEPS = {"realnvp": 3000, "maf": 5000, "nsf": 3000}


class Frame:
    """Stands in for pandas' classes while its pickle is read."""

    def __new__(cls, *arguments: object, **options: object) -> Frame:
        return object.__new__(cls)

    def __init__(self, *arguments: object, **options: object) -> None:
        pass

    def __setstate__(self, state: object) -> None:
        self.state = state


def galaxies() -> np.ndarray:
    """The rows [100000, 7], shuffled by a fixed seed; no code of the pickle is run."""
    stand_ins = {
        ("pandas.core.frame", "DataFrame"): Frame,
        ("pandas.core.internals.managers", "BlockManager"): Frame,
        ("pandas.core.indexes.base", "Index"): Frame,
        ("pandas.core.indexes.range", "RangeIndex"): Frame,
        ("pandas.core.indexes.base", "_new_Index"): Frame,
        ("builtins", "slice"): slice,
    }
    state = restricted_pickle.read(Store().data("galaxy-data"), stand_ins).state
    manager = next(value for value in state.values() if isinstance(value, Frame))
    rows = manager.state[-1]["0.14.1"]["blocks"][0]["values"].T
    return rows[np.random.default_rng(0).permutation(len(rows))].astype(np.float32)


class Whiten(nn.Module):
    """Columns without mean, spread and correlation.

    Computed in float64: float32 there alone moves a log-density by 4e-5 of itself.
    """

    def __init__(self, rows: Tensor) -> None:
        super().__init__()
        covariance, mean = torch.cov(rows.double().T), rows.double().mean(0)
        back = torch.linalg.cholesky(covariance).T
        self.register_buffer("mean", mean.float())
        self.register_buffer("matrix", torch.linalg.inv(back).float())
        self.register_buffer("back", torch.linalg.inv(self.matrix.double()).float())
        self.log_det = float(torch.linalg.slogdet(self.matrix.double())[1])

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        z = (x.double() - self.mean.double()) @ self.matrix.double()
        return z.to(x.dtype), x.new_full((len(x),), self.log_det)

    def inverse(self, z: Tensor) -> Tensor:
        return (z.double() @ self.back.double() + self.mean.double()).to(z.dtype)


class Table(nn.Module):
    """Whitened columns through the layers of a zuko flow."""

    def __init__(self, rows: Tensor, kind: str) -> None:
        super().__init__()
        gentle = partial(zuko.transforms.MonotonicAffineTransform, slope=0.02)
        wide, affine = {"hidden_features": (128, 128)}, {"univariate": gentle}
        make = {
            "realnvp": partial(zuko.flows.RealNVP, transforms=8, **wide, **affine),
            "maf": partial(zuko.flows.MAF, transforms=6, **wide, **affine),
            "nsf": partial(zuko.flows.NSF, transforms=3, bins=8, hidden_features=(96, 96)),
        }
        self.whiten = Whiten(rows)
        self.layers = nn.ModuleList(make[kind](rows.shape[1]).transform.transforms)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x, total = self.whiten(x)
        for layer in self.layers:
            x, log_det = layer(None).call_and_ladj(x)
            total = total + (log_det.sum(1) if log_det.dim() > 1 else log_det)
        return x, total

    def inverse(self, z: Tensor) -> Tensor:
        for layer in reversed(self.layers):
            z = layer(None).inv(z)
        made: Tensor = self.whiten.inverse(z)
        return made


def log_density(model: nn.Module, x: Tensor) -> Tensor:
    """Of each row [n, d], in nats."""
    z, log_det = model(x)
    made: Tensor = -0.5 * (z * z).sum(1) - 0.5 * z.shape[1] * math.log(2 * math.pi) + log_det
    return made


def gaussian(rows: Tensor, held_out: Tensor) -> Tensor:
    """Log-density of the held-out rows under one Gaussian fitted to the others: the baseline."""
    return log_density(Whiten(rows), held_out)


def main() -> None:
    """Train, judge, export."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kind", choices=sorted(STEPS), required=True)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    steps = args.steps or STEPS[args.kind]
    rows = torch.from_numpy(galaxies())
    held_out, rows = rows[:HELD_OUT], rows[HELD_OUT:]
    torch.manual_seed(0)
    model = Table(rows, args.kind).to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        picked = torch.from_numpy(rng.integers(0, len(rows), BATCH))
        return -log_density(model, rows[picked].to(DEVICE)).mean()

    curve, weights = train(
        model, loss_of, steps=steps, rate=RATE, checkpoint=args.output / "checkpoint.pt"
    )
    model.load_state_dict(weights)
    frozen(model)
    with torch.no_grad():
        parts = [log_density(model, held_out[part]) for part in batches(HELD_OUT, 1000)]
        seen = [log_density(model, rows[part]) for part in batches(HELD_OUT, 1000)]
    name = f"galaxy-{args.kind}"
    packed = export(model, rows[:2], args.output, name, {"columns": list(COLUMNS)})
    card = {
        "name": name,
        "data": "100,000 simulated galaxies of pzflow 4.0.0, MIT; 10,000 rows held out",
        "licence": "MIT",
        "parameters": parameters(model),
        "steps": steps,
        "batch": BATCH,
        "log_density_nats": mean_and_error(torch.cat(parts)),
        "log_density_nats_of_training_rows": mean_and_error(torch.cat(seen)),
        "baselines_nats": {"one Gaussian": mean_and_error(gaussian(rows, held_out))},
        **packed,
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
