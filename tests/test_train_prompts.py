"""What trains prompts-wavenet: its module is the graph that is exported, its baselines are laws."""

import sys
import wave
from pathlib import Path

import draws
import numpy as np
import pytest

from leangen import exporters
from leangen.families import waveform
from leangen.session import Session

torch = pytest.importorskip("torch", reason="the export extra is not installed")
pytest.importorskip("safetensors")


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    """bench/train, for the time of a test."""
    before = set(sys.modules)
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench" / "train")
    yield
    for name in set(sys.modules) - before:
        if name in ("prompts", "prompts_wavenet", "shared"):
            del sys.modules[name]


def test_what_is_exported_is_the_module(tmp_path):
    import prompts_wavenet

    torch.manual_seed(0)
    model = prompts_wavenet.WaveNet().half().float()
    prompts_wavenet.save(model, tmp_path / "saved")
    bundle = exporters.export(tmp_path / "saved", tmp_path / "bundle")
    levels = draws.rng().integers(0, 256, 400)
    with torch.no_grad():
        expected = model(torch.from_numpy(levels)[None])[0].numpy()
    got = waveform.logits(Session(bundle, threads=1), levels.tolist())
    np.testing.assert_allclose(got, expected, atol=1e-5 * np.abs(expected).max())


def test_gradients_written_by_hand_are_right():
    import prompts_wavenet

    x = torch.randn(2, 20, 6, dtype=torch.double, requires_grad=True)
    assert torch.autograd.gradcheck(prompts_wavenet.Gate.apply, x)
    assert torch.autograd.gradcheck(lambda x: prompts_wavenet.Taps.apply(x, 3), x)


def write_prompts(folder):
    for i in range(20):
        rng = np.random.default_rng(i)
        sound = 8000 * np.sin(np.arange(3000) * rng.uniform(0.1, 0.5)) + rng.normal(0, 30, 3000)
        with wave.open(str(folder / f"{i:02}.wav"), "wb") as file:
            file.setparams((1, 2, 8000, 0, "NONE", ""))
            file.writeframes(sound.astype("<i2").tobytes())


def test_prompts_are_split_by_file_and_predictors_are_better_than_a_histogram(tmp_path):
    import prompts

    write_prompts(tmp_path)
    learnt, held_out = prompts.prompts(tmp_path)
    assert [len(learnt), len(held_out)] == [18, 2]
    np.testing.assert_array_equal(prompts.compress(waveform.expand(learnt[0], 256)), learnt[0])
    by_levels = prompts.per_sample(prompts.histogram_bits(learnt, held_out))["mean"]
    by_past = prompts.per_sample(prompts.adaptive_bits(held_out, 16))["mean"]
    assert by_past < by_levels - 1
    assert prompts.per_sample(prompts.linear_bits(learnt, held_out))["mean"] < by_levels


def test_chances_of_all_levels_sum_to_1():
    import prompts

    levels = np.arange(256)
    for mean, scale in ((0.0, 1e-4), (0.3, 0.01), (-1.0, 0.2)):
        bits = prompts.laplace_bits(levels, np.full(256, mean), scale)
        assert np.exp2(-bits).sum() == pytest.approx(1)


def test_without_the_prompts_it_is_said_where_they_come_from(tmp_path):
    import prompts

    with pytest.raises(SystemExit, match="has no prompts: `apt-get install asterisk-core-sounds"):
        prompts.prompts(tmp_path / "nowhere")
