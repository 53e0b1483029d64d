"""Measures of quality: against SciPy's and textbook definitions; laws over all families."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny_bundles import BUILDERS

from leangen import audio, quality
from leangen.cli import main
from leangen.errors import RequestError, SourceError
from leangen.families import language as language_family
from leangen.quality import Task, density, features, imaging, language, spectrum, speech, words
from leangen.quality.measures import Measure, mean
from leangen.session import Session

TEXT = "abc ab a cab ab bc " * 12


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_text(f'<doc id="1">\n{TEXT}</doc>\n')
    return path


@pytest.fixture(params=BUILDERS)
def tiny(request, tmp_path, text, monkeypatch):
    """A session per family, and a task that its tiny model can do."""
    monkeypatch.setitem(speech.speech.EXAMPLE, "phonemes", "abc ab.")
    bundle = BUILDERS[request.param](tmp_path / "tiny")
    task = Task(
        data=text if bundle.family == "language" else None,
        tokens=40, prompts=2, new_tokens=3, seeds=3, rows=256,
        steps=2 if bundle.family == "diffusion" else None,
    )  # fmt: skip
    return Session(bundle), task


def test_a_model_is_at_no_distance_from_itself(tiny):
    session, task = tiny
    (found,) = quality.evaluate([session], session, task, lambda *_: None)
    assert found[0].value == pytest.approx(0, abs=1e-12), "the first measure is the loss"
    for measure in found:
        assert np.isfinite(measure.value)
        assert measure.n > 0
        assert measure.of
        json.dumps(measure.to_json(), allow_nan=False)
    by_name = {m.name: m for m in found}
    for perfect, value in (("SSIM", 1), ("top-1 agreement", 100), ("flip rate", 0)):
        assert perfect not in by_name or by_name[perfect].value == pytest.approx(value)


def test_models_of_two_families_are_not_compared(tmp_path):
    one = Session(BUILDERS["oneshot"](tmp_path / "a"))
    other = Session(BUILDERS["flow/density"](tmp_path / "b"))
    with pytest.raises(RequestError, match="expected one family"):
        quality.evaluate([one], other, Task(), lambda *_: None)


def test_mean_and_its_spread():
    values = np.random.default_rng(0).normal(3, 2, 4000)
    measure = mean("x", values, "draws")
    assert measure.value == pytest.approx(3, abs=measure.u)
    assert measure.u == pytest.approx(2 * 2 / np.sqrt(4000), rel=0.05)
    assert mean("x", [1.0], "draws").u is None


def test_language_against_torch(tmp_path, text):
    """KL, loss and agreement of two random models by torch's own functions."""
    torch = pytest.importorskip("torch")
    rng = np.random.default_rng(1)
    p, q = (rng.normal(0, 2, (70, 90)).astype(np.float32) for _ in range(2))
    came = rng.integers(0, 90, 70)
    a = language.Scored(p, came, [[1, 2, 3]], 3)
    b = language.Scored(q, came, [[1, 2, 4]], 3)
    found = {m.name: m for m in language.measure(a, b)}
    logs = [torch.log_softmax(torch.from_numpy(x).double(), -1) for x in (p, q)]
    kl = torch.nn.functional.kl_div(logs[1], logs[0], reduction="none", log_target=True).sum(-1)
    assert found["KL divergence"].value == pytest.approx(kl.mean().item(), rel=1e-6)
    assert found["KL divergence"].u == pytest.approx(2 * kl.std().item() / np.sqrt(70), rel=1e-6)
    loss = [torch.nn.functional.nll_loss(x, torch.from_numpy(came)).item() for x in logs]
    assert found["perplexity"].value == pytest.approx(np.exp(loss[1]), rel=1e-6)
    assert found["log-perplexity change"].value == pytest.approx(loss[1] - loss[0], rel=1e-6)
    assert found["greedy tokens in common, of 3"].value == 2


def test_windows_cover_the_text_once(tmp_path, text, monkeypatch):
    monkeypatch.setattr(language, "WINDOW", 16)
    session = Session(BUILDERS["language"](tmp_path / "tiny"))
    ids = language_family.tokenizer(session).encode(language.read(text)).ids[:40]
    seen = language.observe(session, Task(data=text, tokens=40), None)
    starts = range(0, 40, 16)
    assert seen.tokens.tolist() == [i for s in starts for i in ids[s + 1 : s + 16]]
    whole = language_family.logits(session, ids[16:32])
    np.testing.assert_allclose(seen.logits[15:30], whole[:-1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("content", "message"), [(None, "as text"), ("<doc>", "is empty")])
def test_text_that_cannot_be_scored(tmp_path, content, message):
    path = tmp_path / "t.txt"
    if content is not None:
        path.write_text(content)
    with pytest.raises(RequestError, match=message):
        language.read(path)


def test_ssim_is_scipys():
    ndimage = pytest.importorskip("scipy.ndimage")
    rng = np.random.default_rng(0)
    x = rng.normal(0, 1, (40, 33))
    y = x + rng.normal(0, 0.4, x.shape)
    c1, c2 = (0.01 * np.ptp(x)) ** 2, (0.03 * np.ptp(x)) ** 2

    def blur(image):
        return ndimage.gaussian_filter(image, 1.5, truncate=3.5)

    ux, uy = blur(x), blur(y)
    vx, vy, cov = blur(x * x) - ux**2, blur(y * y) - uy**2, blur(x * y) - ux * uy
    full = (2 * ux * uy + c1) * (2 * cov + c2) / ((ux**2 + uy**2 + c1) * (vx + vy + c2))
    assert imaging.ssim(x[..., None], y[..., None]) == pytest.approx(full[5:-5, 5:-5].mean())
    assert imaging.ssim(x[..., None], x[..., None]) == pytest.approx(1)
    assert imaging.ssim(x[:3, :2, None], x[:3, :2, None]) == pytest.approx(1), "smaller than 11"


def test_psnr_of_a_known_error():
    x = np.linspace(0, 1, 100).reshape(10, 10, 1)
    assert imaging.psnr_db(x, x + 0.1) == pytest.approx(20)


def test_the_spectrum_of_power_law_noise_has_its_slope():
    """Noise of amplitude f^-1.5 has power f^-3: -30 dB a decade."""
    rng = np.random.default_rng(0)
    n = 128
    f = np.hypot(np.fft.fftfreq(n)[:, None], np.fft.fftfreq(n)[None])
    f[0, 0] = np.inf
    noise = [
        np.fft.ifft2(np.fft.fft2(rng.normal(size=(n, n))) * f**-1.5).real[..., None]
        for _ in range(8)
    ]
    curve = np.mean([spectrum.radial(image) for image in noise], axis=0)
    rings = np.arange(1, len(curve) + 1)
    slope = np.polyfit(np.log10(rings[4:50]), curve[4:50], 1)[0]
    assert slope == pytest.approx(-30, abs=1.5)
    scaled = [7 * image + 3 for image in noise]
    assert spectrum.measures(noise, scaled, None)[0].value == pytest.approx(0, abs=1e-6)


def test_real_pictures_are_cut_into_tiles(tmp_path):
    from PIL import Image

    heights = np.arange(20 * 17, dtype=np.int16).reshape(20, 17)
    np.save(tmp_path / "a.npy", heights)
    tiles = spectrum.load(tmp_path / "a.npy", (8, 8, 1))
    assert tiles.shape == (4, 8, 8, 1)
    np.testing.assert_array_equal(tiles[3, ..., 0], heights[8:16, 8:16])
    np.savez(tmp_path / "b.npz", x=np.zeros((3, 8, 8, 1)), names=np.array(["a"]))
    assert len(spectrum.load(tmp_path / "b.npz", (8, 8, 1))) == 3
    (tmp_path / "folder").mkdir()
    Image.fromarray(np.zeros((9, 9, 3), np.uint8)).save(tmp_path / "folder" / "p.png")
    assert spectrum.load(tmp_path / "folder", (8, 8, 3)).shape == (1, 8, 8, 3)
    Image.fromarray(np.full((9, 9), 65535, np.uint16)).save(tmp_path / "folder" / "q.tif")
    tiles = spectrum.load(tmp_path / "folder", (8, 8, 1), (-1.0, 1.0))
    assert [tile.mean() for tile in tiles] == [-1, 1], "16 bits a pixel too, as the model's values"
    np.save(tmp_path / "first.npy", np.zeros((2, 3, 8, 9)))
    assert spectrum.load(tmp_path / "first.npy", (8, 8, 3)).shape == (2, 8, 8, 3)
    (tmp_path / "empty.npy").write_bytes(b"")
    (tmp_path / "cut.npz").write_bytes((tmp_path / "b.npz").read_bytes()[:-30])
    for path, shape, message in (
        (tmp_path / "empty.npy", (8, 8, 1), "cannot read"),
        (tmp_path / "cut.npz", (8, 8, 1), "cannot read"),
        (tmp_path / "a.npy", (64, 64, 1), "no picture of 64 x 64"),
        (tmp_path / "a.npy", (8, 8, 3), "1 channels, the model draws 3"),
        (tmp_path / "missing.npy", (8, 8, 1), "cannot read"),
        (tmp_path / "t.csv", (8, 8, 1), "expected a folder of images"),
    ):
        with pytest.raises(RequestError, match=message):
            spectrum.load(path, shape)


def test_frechet_is_scipys():
    linalg = pytest.importorskip("scipy.linalg")
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(300, 6)), rng.normal(0.3, 1.4, size=(200, 6))
    s, t = np.cov(a.T), np.cov(b.T)
    wanted = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * linalg.sqrtm(s @ t).real)
    assert features.frechet(a, b) == pytest.approx(wanted, rel=1e-6)


def network(path, text, **weights):
    from tiny_bundles import _graph

    return _graph(text, path, **weights)


def test_a_named_network_gives_its_distances(tmp_path):
    maps = network(
        tmp_path / "maps.onnx",
        "g (float[n, 1, 8, 8] x) => (float[n, 4, 8, 8] y, float[n, 1] v) "
        "{ y = Conv <pads = [1, 1, 1, 1]> (x, w) v0 = GlobalMaxPool (x) v = Flatten (v0) }",
        w=(4, 1, 3, 3),
    )
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(2, 5, 8, 8, 1))
    found = {m.name: m for m in features.Network(maps).measures(a, b, a)}
    assert found["perceptual distance (maps)"].value > 0
    assert found["perceptual distance (maps)"].n == 5
    assert found["reference Fréchet distance to data (maps)"].value == pytest.approx(0, abs=1e-9)
    same = features.Network(maps).measures(a, a, None)
    assert [m.value for m in same] == pytest.approx([0, 0], abs=1e-9)
    pair = network(
        tmp_path / "pair.onnx",
        "g (float[n, 1, 8, 8] x, float[n, 1, 8, 8] z) => (float[n, 1] y) "
        "{ d = Sub (x, z) p = GlobalMaxPool (d) y = Flatten (p) }",
    )
    (measure,) = features.Network(pair).measures(a, b, None)
    assert measure.value == pytest.approx((a - b).max(axis=(1, 2, 3)).mean(), rel=1e-5)
    assert (measure.name, measure.n) == ("pair distance", 5)
    with pytest.raises(RequestError, match="does not take pictures"):
        features.Network(maps).measures(np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 3)), None)
    (tmp_path / "broken.onnx").write_bytes(b"x")
    for name in ("broken.onnx", "missing.onnx"):
        with pytest.raises(SourceError):
            features.Network(tmp_path / name)


def test_the_energy_distance_is_scipys_in_one_dimension():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=4000), rng.normal(0.5, 1.0, size=4000)
    found = density.energy_distance(x[:, None], y[:, None])
    wanted = stats.energy_distance(x / x.std(), y / x.std()) ** 2  # SciPy takes the root
    assert found.value == pytest.approx(wanted, abs=found.u)
    equal = density.energy_distance(x[:, None], rng.normal(size=(4000, 1)))
    assert abs(equal.value) < 1.5 * equal.u, "unbiased: around 0 for equal distributions"
    assert found.n == 2000
    with pytest.raises(RequestError, match="32 samples or more"):
        density.energy_distance(x[:20, None], y[:20, None])


def test_cepstral_distance_is_scipys_dct():
    fft = pytest.importorskip("scipy.fft")
    rng = np.random.default_rng(0)
    a, b = rng.normal(0, 0.1, (2, 8000))
    logs = [audio.log_mel(x, 22_050) * np.log(10) / 20 for x in (a, b)]
    # SciPy's type-2 DCT is 2 sum x cos: c_m of log|H| = sum c_m cos(m w) is that over the bands
    c = [fft.dct(x, type=2, axis=1)[:, 1:14] / x.shape[1] for x in logs]
    wanted = np.mean(10 / np.log(10) * np.sqrt(2 * ((c[0] - c[1]) ** 2).sum(axis=1)))
    assert speech.cepstral_distance(a, b, 22_050) == pytest.approx(wanted)
    with pytest.raises(RequestError, match="cannot compare sounds"):
        speech.cepstral_distance(a, b[:-1], 22_050)


def test_word_error_rate_is_a_ratio_of_sums():
    (found,) = speech._word_error_rate("w", [(0, 8), (2, 8), (1, 4)])
    assert found == Measure("w", pytest.approx(15), pytest.approx(found.u), 3, "sentences", "%")
    assert found.u > 0
    assert words.errors("a b c".split(), "a c".split()) == 1


def test_a_flow_that_loses_support_says_so(tmp_path):
    rows = np.zeros((64, 3))
    apart = np.zeros(64)
    rng = np.random.default_rng(0)
    a = density.Scored(rows, False, np.ones(64), rng.normal(size=(64, 3)), apart)
    q = np.ones(64)
    q[:8] = -np.inf
    b = density.Scored(rows, False, q, a.drawn, apart)
    assert {m.name: m.value for m in density.measure(a, b)}["rows lost from the support"] == 12.5
    with pytest.raises(RequestError, match="no row has a finite"):
        density.measure(a, density.Scored(rows, False, np.full(64, -np.inf), a.drawn, apart))


@pytest.mark.parametrize("field", ["tokens", "new_tokens", "seeds", "rows", "prompts"])
def test_tasks_check_their_fields(field):
    with pytest.raises(RequestError, match=f"{field} is -1"):
        Task(**{field: -1})


def test_the_command(tmp_path, text, capsys):
    folder = BUILDERS["diffusion"](tmp_path / "d").path
    assert main(["eval", str(folder), "--reference", str(folder), "--steps", "2", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert document["measures"][0]["name"] == "relative RMSE"
    assert document["measures"][0]["value"] == 0
    names = [m["name"] for m in document["measures"]]
    assert "relative RMSE after step 1 of 2" in names
    assert main(["eval", str(folder), "--reference", str(folder)]) == 0
    assert "PSNR" in capsys.readouterr().out
    for bad in (["--seeds", "0"], ["--data", str(tmp_path / "no.npy")], ["--features", "no.onnx"]):
        assert main(["eval", str(folder), "--reference", str(folder), *bad]) == 2
        assert "leangen: error:" in capsys.readouterr().err


def test_the_reference_may_be_a_scheme(tmp_path):
    from leangen.commands.task import reference_of

    bundle = BUILDERS["oneshot"](tmp_path / "o")
    assert reference_of(bundle, "int8") == f"{bundle.name}:int8"
    assert reference_of(bundle, "terrain") == "terrain"
    assert reference_of(bundle, "terrain:int8") == "terrain:int8"
    assert reference_of(bundle, str(bundle.path)) == str(bundle.path)
