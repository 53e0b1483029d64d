"""Torch modules by factory: exported, compared with torch, run, quantized; and what is refused."""

from pathlib import Path

import numpy as np
import pytest

torch = pytest.importorskip("torch", reason="torch is not installed")

import torch_models  # noqa: E402
from flow_models import drain  # noqa: E402

from leangen import exporters, families, quantize  # noqa: E402
from leangen.bundle import Bundle  # noqa: E402
from leangen.cli import main  # noqa: E402
from leangen.errors import RequestError, SourceError, UnsupportedError  # noqa: E402
from leangen.exporters import torch_check, torch_flow, torch_module  # noqa: E402
from leangen.families import density, oneshot  # noqa: E402
from leangen.session import Session  # noqa: E402

HERE = Path(torch_models.__file__)
FLOWS, ONE_SHOT = torch_models.FLOWS, torch_models.ONE_SHOT


def source(name: str) -> Path:
    return Path(f"{HERE}:{name}")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """The bundle of a model by name, exported once."""
    made: dict[str, Bundle] = {}

    def get(name: str) -> Bundle:
        library = name.partition("_")[0]
        if library in torch_flow.LIBRARIES:
            pytest.importorskip(library, reason=f"{library} is not installed")
        if name not in made:
            folder = tmp_path_factory.mktemp(name)
            made[name] = exporters.export(source(name), folder / "bundle")
        return made[name]

    return get


def opened(name):
    """The library's own flow, and data."""
    made = torch_module.build(source(name), None, {})
    return torch_flow.open_flow(made.module, made.examples[0]), made.examples[0]


def rms(array):
    return float(np.sqrt(np.mean(np.square(np.asarray(array, np.float64)))))


@pytest.mark.parametrize("name", [*FLOWS, *ONE_SHOT])
def test_computes_what_torch_does(exported, name):
    bundle = exported(name)
    assert bundle.family == {"flow_matching": "diffusion"}.get(
        name, "flow" if name in FLOWS else "oneshot"
    )
    found = exporters.check(source(name), bundle)
    assert {difference.input for difference in found} == {"example", "random"}
    for difference in found:
        assert difference.passed, str(difference)


@pytest.mark.parametrize("name", FLOWS)
def test_a_flow_inverts_itself_and_has_the_librarys_density(exported, name):
    session = Session(exported(name), threads=1, kernels="ort")
    flow, data = opened(name)
    rows = torch.cat([data, 3 * data])  # beyond the bounds of splines too
    with torch.no_grad():
        wanted = flow.log_density(rows).double().numpy()
        latent = flow.encode(rows)[0].reshape(len(rows), *flow.latent_shape)
        theirs = (flow.decode(latent) - rows).numpy()
    flat = rows.flatten(1).numpy()
    log_density, latent = session.run("log_prob", {"x": flat}, ["log_prob", "latent"])
    np.testing.assert_allclose(log_density, wanted, rtol=1e-5, atol=1e-5)
    back = session.run("sample", {"latent": latent}, ["x"])[0]
    assert rms(back - flat) <= 2 * rms(theirs) + 1e-7


@pytest.mark.parametrize("name", [*torch_models.QUANTIZED, *ONE_SHOT])
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_quantized_models_stay_close(exported, tmp_path, name, scheme):
    bundle = exported(name)
    small = quantize.quantize(bundle, scheme, tmp_path / "small")
    assert any(entry["treatment"] != "fp32" for entry in small.quantization["nodes"].values())
    request = families.of(bundle).Request(**({"count": 64} if name in FLOWS else {"seed": 3}))
    exact, rough = (
        drain(families.of(bundle).run(Session(b, threads=1), request))[1].array
        for b in (bundle, small)
    )
    assert rms(rough - exact) < (0.1 if scheme == "int8" else 0.25) * rms(exact)
    if name in FLOWS:
        assert_same_weights_both_ways(small)


def assert_same_weights_both_ways(bundle):
    """A quantized flow still inverts itself: what both directions share was rounded alike."""
    session = Session(bundle, threads=1)
    latent = next(density.latents(session, 32, seed=5))
    x = session.run("sample", {"latent": latent}, ["x"])[0]
    np.testing.assert_allclose(session.run("log_prob", {"x": x}, ["latent"])[0], latent, atol=2e-3)
    nodes = bundle.quantization["nodes"]
    assert all(
        entry["treatment"] == "fp32" for node, entry in nodes.items() if "/bijection/" in node
    )


@pytest.mark.parametrize("name", [*torch_models.QUANTIZED, *ONE_SHOT])
def test_a_seed_gives_the_same_on_any_number_of_threads(exported, name):
    bundle = exported(name)
    request = families.of(bundle).Request(count=3, seed=7)
    one, two = (
        drain(families.of(bundle).run(Session(bundle, threads=n), request))[1] for n in (1, 2)
    )
    assert np.array_equal(one.array, two.array)
    assert one.media == families.media(bundle)


def _normflows(layer):
    return normflows().NormalizingFlow(normflows().distributions.DiagGaussian(4), [layer])


def _circular():
    bound = torch.tensor([3.14, 3.0, 3.14, 3.0])
    kind = normflows().flows.CircularCoupledRationalQuadraticSpline
    layer = kind(4, 1, 8, [0, 2], tail_bound=bound)
    torch.nn.init.normal_(layer.prqct.transform_net.final_layer.weight)
    return _normflows(layer)


def _diagonal():
    nflows = pytest.importorskip("nflows", reason="nflows is not installed")
    from nflows.distributions import DiagonalNormal
    from nflows.transforms import LULinear

    base = DiagonalNormal([4])
    torch.nn.init.normal_(base.mean_), torch.nn.init.normal_(base.log_std_)
    return nflows.flows.Flow(LULinear(4), base)


def _bounded():
    nflows = pytest.importorskip("nflows", reason="nflows is not installed")
    from nflows.distributions import StandardNormal
    from nflows.transforms import PiecewiseRationalQuadraticCouplingTransform

    def net(inputs, outputs):
        return nflows.nn.nets.ResidualNet(inputs, outputs, 8, num_blocks=1)

    layer = PiecewiseRationalQuadraticCouplingTransform([0, 1, 0, 1], net, num_bins=3)
    return nflows.flows.Flow(layer, StandardNormal([4]))


def normflows():
    return pytest.importorskip("normflows", reason="normflows is not installed")


@pytest.mark.parametrize(
    "make",
    [
        pytest.param(lambda: _normflows(normflows().transforms.Shift()), id="overwrites its input"),
        pytest.param(_circular, id="circles and lines"),
        pytest.param(_diagonal, id="base with a mean"),
        pytest.param(_bounded, id="data from 0 to 1 alone"),
    ],
)
def test_parts_that_the_models_have_not(tmp_path, make):
    torch.manual_seed(0)
    module, rows = make().eval().requires_grad_(False), torch.randn(7, 4)
    example = torch.sigmoid(rows) if make is _bounded else rows
    made = torch_module.Made(module, (example,), "flow", {})
    bundle = torch_module.write(made, tmp_path / "bundle", name="x", source={})
    for difference in torch_check.differences(made, bundle):
        assert difference.passed, difference


class _Counting(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, z):
        made = z * self.calls
        self.calls.add_(1)
        return made


class _Missing(torch.nn.Module):
    def forward(self, z):
        return z @ torch.ones(3, 3)


class _Double(torch.nn.Module):
    def forward(self, z):
        return torch.nn.functional.softplus(z.double())


@pytest.mark.parametrize(
    ("module", "error", "text"),
    [
        (_Counting(), UnsupportedError, "the module changes its own 'calls' as it runs"),
        (
            _Missing(),
            SourceError,
            r"_Missing with an example of shape \[2, 3, 4, 4\] raised Runt.*",
        ),
        (_Double(), UnsupportedError, "ONNX Runtime does not run the module's graph .*Softplus"),
    ],
)
def test_modules_that_cannot_run_in_a_graph(tmp_path, module, error, text):
    made = torch_module.Made(module, (torch.randn(2, 3, 4, 4),), "decoder", {})
    with pytest.raises(error, match=text):
        torch_module.write(made, tmp_path / "bundle", name="x", source={})
    assert not (tmp_path / "bundle").exists()


def test_images_of_a_flow_are_scored_in_bits_per_dimension(exported, tmp_path):
    session = Session(exported("normflows_glow"), threads=1)
    drawn = drain(density.run(session, density.Request(count=3)))[1]
    assert drawn.array.shape == (3, 8, 8, 1) and drawn.media == "image"
    scores = drain(density.run(session, density.Request(data=drawn.array)))[1]
    assert scores.extra["columns"] == ["log_density", "bits_per_dimension"]
    log_density, bits = scores.array.T
    np.testing.assert_allclose(bits, 8 - log_density / (64 * np.log(2)), rtol=1e-5)
    flat = drain(density.run(session, density.Request(data=density.as_rows(drawn.array))))[1]
    assert np.array_equal(flat.array, scores.array)

    from PIL import Image

    (tmp_path / "pictures").mkdir()
    Image.fromarray(np.full((8, 8), 128, np.uint8)).save(tmp_path / "pictures" / "grey.png")
    request = density.Request(data=tmp_path / "pictures", seed=1)
    rows = density.rows_of(request.data, session.bundle.config, 1)
    assert rows.shape == (1, 64) and (rows >= 128 / 256).all() and (rows < 129 / 256).all()
    with pytest.raises(RequestError, match=r"data has shape \[2, 4, 4, 1\]"):
        drain(density.run(session, density.Request(data=np.zeros((2, 4, 4, 1)))))


def test_what_an_encoder_makes_goes_into_a_decoder(exported):
    encoder, decoder = (
        Session(exported(f"vae_{kind}"), threads=1) for kind in ("encoder", "decoder")
    )
    image = np.random.default_rng(0).uniform(-1, 1, (16, 16, 3)).astype(np.float32)
    latent = drain(oneshot.run(encoder, oneshot.Request(image=image)))[1]
    assert latent.array.shape == (1, 64) and latent.media == "table"
    given = np.arange(2 * 256, dtype=np.float32).reshape(2, 256) / 256
    decoded = drain(oneshot.run(decoder, oneshot.Request(latent=given)))[1]
    wanted = decoder.run("model", {"z": given[1].reshape(1, 4, 8, 8)})[0]
    assert np.array_equal(decoded.array[1], np.moveaxis(wanted[0], 0, -1))
    for session, options in ((encoder, {"latent": given}), (decoder, {"image": image})):
        with pytest.raises(RequestError, match="this model"):
            drain(oneshot.run(session, oneshot.Request(**options)))
    with pytest.raises(RequestError, match=r"latent has shape \[3\]"):
        drain(oneshot.run(decoder, oneshot.Request(latent=[1, 2, 3])))


def test_the_command_line_exports_checks_and_generates(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(HERE.parent)  # module:factory is found from the working folder
    monkeypatch.setenv("LEANGEN_HOME", str(tmp_path / "home"))
    bundle = tmp_path / "bundle"
    options = ["--check", "--option", 'columns=["a","b","c","d","e","f"]']
    assert main(["export", "torch_models:plain_coupling", "-o", str(bundle), *options]) == 0
    assert "log-density differs from torch by at most" in capsys.readouterr().out
    assert main(["generate", str(bundle), "--count", "5", "-o", str(tmp_path / "r.csv")]) == 0
    assert (tmp_path / "r.csv").read_text().startswith("a,b,c,d,e,f\n")
    assert main(["export", "torch_models:fourier", "-o", str(tmp_path / "no")]) == 2
    assert "complex64" in capsys.readouterr().err and not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("where", "error", "text"),
    [
        (f"{HERE}:missing", SourceError, "has no function 'missing': expected one of .*zuko_maf"),
        ("no.such.module:factory", SourceError, "no Python module 'no.such.module' here"),
        ("missing.py:factory", SourceError, r"there is no file missing\.py"),
        (f"{HERE}:nonsense", SourceError, "nonsense returns int: expected .module, example input"),
        (
            f"{HERE}:failing",
            SourceError,
            r"raised ValueError at torch_models\.py:\d+: no such file",
        ),
        (f"{HERE}:fourier", UnsupportedError, r"torch_models\.py:\d+: the operator aten\._to_copy"),
        (f"{HERE}:branching", UnsupportedError, r"torch_models\.py:\d+: the code branches on"),
        (f"{HERE}:noisy", UnsupportedError, r"torch_models\.py:\d+: random numbers are drawn"),
    ],
)
def test_factories_that_cannot_be_used(tmp_path, where, error, text):
    with pytest.raises(error, match=text):
        exporters.export(Path(where), tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


def test_weights_are_safetensors_or_a_pickled_state_dict_that_fit(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    module, _ = torch_models.plain_coupling()
    state = module.state_dict()
    good, pickled, wrong = (tmp_path / n for n in ("w.safetensors", "w.pt", "x.safetensors"))
    safetensors.save_file(state, good)
    torch.save(state, pickled)
    safetensors.save_file({"turn": torch.ones(2, 2), "other": torch.ones(1)}, wrong)
    factory = source("plain_coupling")
    x = torch_models.rows()
    for weights in (good, pickled):
        bundle = exporters.export(factory, tmp_path / weights.suffix, weights=weights)
        assert bundle.source["weights"] == weights.name
        got = Session(bundle).run("log_prob", {"x": x.numpy()}, ["latent"])[0]
        np.testing.assert_allclose(got, module(x)[0].detach().numpy(), atol=1e-4)
    for path, text in (
        (wrong, r"net\.0\.weight is missing.* 3 more"),
        (tmp_path / "none.safetensors", "there is no file"),
    ):
        with pytest.raises(SourceError, match=text):
            exporters.export(factory, tmp_path / "other", weights=path)
