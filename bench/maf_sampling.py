"""Sampling of a masked autoregressive flow: the exported Scan beside D full passes.

    python bench/maf_sampling.py         (after pip install zuko torch)

The flow is zuko's MAF of random weights: 784 features, two transforms, two hidden layers of 512.
D full passes is D times one pass of the exported density graph, which runs each network once;
`torch_s` is zuko's own sampling, which makes those D passes. Runs alternate; medians. JSON comes
last.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import zuko

from leangen import clock
from leangen.bundle import create, open_bundle
from leangen.exporters import torch_flow
from leangen.session import Session


def seconds(run: Callable[[], object]) -> float:
    """How long a call takes."""
    start = clock.monotonic_ns()
    run()
    return (clock.monotonic_ns() - start) / 1e9


def main() -> None:
    """Print what is found, JSON last."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--features", type=int, default=784)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--transforms", type=int, default=2)
    parser.add_argument("--rows", type=int, nargs="+", default=[1, 16, 256])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--torch-rows", type=int, default=16, help="0 leaves zuko's sampling out")
    args = parser.parse_args()

    torch.manual_seed(0)
    hidden = (args.hidden, args.hidden)
    module = zuko.flows.MAF(args.features, transforms=args.transforms, hidden_features=hidden)
    module = module.eval().requires_grad_(False)
    example = torch.randn(2, args.features)
    with tempfile.TemporaryDirectory() as folder:
        flow = torch_flow.open_flow(module, example)
        with create(Path(folder) / "maf") as draft:
            export_s = seconds(
                lambda: draft.graphs.update(torch_flow.write(flow, module, example, draft.folder))
            )
            draft.name, draft.family = "maf", "flow"
        session = Session(open_bundle(Path(folder) / "maf"))
        found = [_compare(session, flow, rows, args) for rows in args.rows]
    print(json.dumps({"features": args.features, "export_s": export_s, "rows": found}))


def _compare(
    session: Session, flow: torch_flow.Flow, rows: int, args: argparse.Namespace
) -> dict[str, Any]:
    latent = np.random.default_rng(0).standard_normal((rows, args.features)).astype(np.float32)
    x = session.run("sample", {"latent": latent}, ["x"])[0]
    session.run("log_prob", {"x": x})
    scans, passes = [], []
    for _ in range(args.rounds):
        scans.append(seconds(lambda: session.run("sample", {"latent": latent}, ["x"])))
        passes.append(seconds(lambda: session.run("log_prob", {"x": x}, ["log_prob"])))
    scan_s, pass_s = statistics.median(scans), statistics.median(passes)
    found = {
        "n": rows,
        "scan_s": scan_s,
        "scan_range_s": [min(scans), max(scans)],
        "full_pass_s": pass_s,
        "ratio": args.features * pass_s / scan_s,
    }
    if rows == args.torch_rows:
        torch_s = seconds(lambda: flow.decode(torch.from_numpy(latent)))
        found |= {"torch_s": torch_s, "torch_ratio": torch_s / scan_s}
    print(found, flush=True)
    return found


if __name__ == "__main__":
    main()
