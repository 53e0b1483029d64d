"""Flows of torch against themselves in float64: how exact the exported graphs are."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")
pytest.importorskip("zuko", reason="zuko is not installed")

import torch_models  # noqa: E402

from leangen import exporters  # noqa: E402
from leangen.exporters import torch_flow, torch_module  # noqa: E402
from leangen.session import Session  # noqa: E402


@pytest.mark.parametrize("name", ["zuko_nsf", "zuko_layers_in_a_module"])
def test_far_in_the_tails_a_flow_is_as_exact_as_near_them(name, tmp_path):
    source = Path(f"{torch_models.__file__}:{name}")
    session = Session(exporters.export(source, tmp_path / "bundle"), threads=1, kernels="ort")
    made = torch_module.build(source, None, {})
    rows = 6 * made.examples[0]
    with torch.no_grad():
        exact = torch_flow.open_flow(made.module.double(), rows.double()).encode(rows.double())[1]
    found = session.run("log_prob", {"x": rows.numpy()}, ["log_prob"])[0]
    np.testing.assert_allclose(found, exact.numpy(), rtol=3e-6)


def test_what_a_module_computes_in_float64_stays_so(tmp_path):
    """A matrix too: here float32 would lose what the large mean leaves."""

    class Shifted(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.matrix = torch.nn.Parameter(torch.tensor([[30.0, 1.0], [0.0, 20.0]]))

        def forward(self, x):
            z = (x.double() - 1000.0) @ self.matrix.double()
            return z.float(), x.new_full((len(x),), float(np.log(600.0)))

        def inverse(self, z):
            return (z.double() @ torch.linalg.inv(self.matrix.double()) + 1000.0).float()

    made = torch_module.Made(Shifted().requires_grad_(False), (torch.zeros(2, 2),), "flow", {})
    bundle = torch_module.write(made, tmp_path / "bundle", name="shifted", source={})
    rows = np.random.default_rng(0).normal(1000, 0.1, (50, 2)).astype(np.float32)
    (z,) = Session(bundle, threads=1, kernels="ort").run("log_prob", {"x": rows}, ["latent"])
    exact = (rows.astype(np.float64) - 1000) @ np.array([[30.0, 1.0], [0.0, 20.0]])
    np.testing.assert_allclose(z, exact, rtol=1e-6)
