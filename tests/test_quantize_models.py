"""The published models at 8 and 4 bits: how far each is from its fp32 self, and how small."""

import re

import numpy as np
import pytest
from flow_models import drain
from real_models import source, store

from leangen import audio
from leangen.families import density, diffusion, language, speech
from leangen.quality.language import kl_and_top1
from leangen.quantize import quantize
from leangen.session import Session

pytestmark = pytest.mark.slow

TERRAIN_SEEDS = range(16)
SPEECH_SEEDS = range(4)
TOKENS = 4000
WINDOW = 500
DENSITY_ROWS = 4096


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    """Bundles by name and scheme: fp32 from the store, the others quantized afresh, once."""
    folder, made = tmp_path_factory.mktemp("quantized"), {}

    def get(name, scheme="fp32"):
        if (name, scheme) not in made:
            if scheme == "fp32":
                source(name)  # skips where the model cannot be had
                made[name, scheme] = store().resolve(f"{name}:fp32")
            else:
                made[name, scheme] = quantize(get(name), scheme, folder / f"{name}-{scheme}")
        return made[name, scheme]

    return get


def report(record_property, bundle, **figures):
    """Print the figures (`-s` shows them) and keep them in the test report."""
    figures |= {
        key: bundle.quantization[key] for key in ("bits_per_weight", "weights_8bit_or_fewer")
    }
    for name, value in figures.items():
        record_property(name, float(value))
    print(f"\n{bundle.name}:{bundle.scheme}", {k: round(float(v), 5) for k, v in figures.items()})


@pytest.fixture(scope="module")
def terrain_fp32(bundle):
    return _heightmaps(bundle("terrain"))


def _heightmaps(of):
    session = Session(of)
    return [
        drain(diffusion.run(session, diffusion.Request(seed=s)))[1].array for s in TERRAIN_SEEDS
    ]


@pytest.mark.parametrize(("scheme", "largest"), [("int8", 0.10), ("int4", 0.20)])
def test_terrain_keeps_its_shape(bundle, terrain_fp32, record_property, scheme, largest):
    low = bundle("terrain", scheme)
    errors = [
        np.linalg.norm(ours - exact) / np.linalg.norm(exact)
        for ours, exact in zip(_heightmaps(low), terrain_fp32, strict=True)
    ]
    report(record_property, low, relative_rmse=np.mean(errors), worst_seed=np.max(errors))
    assert np.mean(errors) <= largest
    if scheme == "int8":
        assert low.quantization["weights_8bit_or_fewer"] >= 0.95
    else:
        assert low.quantization["bits_per_weight"] <= 5


def test_a_voice_sounds_the_same(bundle, record_property):
    exact, low = Session(bundle("piper-joe")), Session(bundle("piper-joe", "int8"))
    distances = []
    for seed in SPEECH_SEEDS:
        said = {"phonemes": speech.EXAMPLE["phonemes"], "seed": seed}
        _, reference = drain(speech.run(exact, speech.Request(**said)))
        rhythm = reference.extra["durations"]
        _, ours = drain(speech.run(low, speech.Request(**said, durations=rhythm)))
        rate = reference.sample_rate_hz
        distances.append(audio.log_mel_distance(reference.array, ours.array, rate))
    report(record_property, low.bundle, log_mel_db=np.mean(distances))
    assert np.mean(distances) < 3


def test_a_voice_keeps_its_rhythm(bundle):
    """Durations are ceilings of predictions: a rounding may move one by a frame, no more."""
    said = speech.Request(phonemes=speech.EXAMPLE["phonemes"])
    exact, low = (
        np.array(drain(speech.run(Session(of), said))[1].extra["durations"])
        for of in (bundle("piper-joe"), bundle("piper-joe", "int8"))
    )
    assert np.abs(exact - low).max() <= 2
    assert abs(int(exact.sum()) - int(low.sum())) <= 0.03 * exact.sum()


def test_galaxies_stay_as_likely(bundle, record_property):
    exact, low = Session(bundle("galaxy-flow")), Session(bundle("galaxy-flow", "int8"))
    rows = drain(density.run(exact, density.Request(count=DENSITY_ROWS)))[1].array
    reference, ours = (
        drain(density.run(session, density.Request(data=rows)))[1].array for session in (exact, low)
    )
    change = float(np.mean(ours - reference))
    report(record_property, low.bundle, log_density_change_nats=change)
    assert np.isfinite(ours).all()
    assert abs(change) < 0.05


def test_text_is_predicted_alike(bundle, record_property):
    exact, low = Session(bundle("smollm2-135m")), Session(bundle("smollm2-135m", "int8"))
    text = re.sub("</?doc[^>]*>", "", source("wiki-text").read_text(encoding="utf-8"))
    tokens = language.tokenizer(exact).encode(text[:40000]).ids[:TOKENS]
    assert len(tokens) == TOKENS
    divergence, same = [], []
    for start in range(0, TOKENS, WINDOW):
        window = tokens[start : start + WINDOW]
        kl, agree = kl_and_top1(language.logits(exact, window), language.logits(low, window))
        divergence.append(kl)
        same.append(agree)
    report(record_property, low.bundle, kl_nats=np.mean(divergence), top1=np.mean(same))
    assert np.mean(divergence) <= 0.01
    assert np.mean(same) >= 0.96
