"""Every encoder-decoder of transformers that leangen exports, against transformers itself."""

from __future__ import annotations

import json

import numpy as np
import pytest
from encoder_decoder_models import VARIANTS, WHISPER, checkpoint
from transformers_models import VOCAB, torch

from leangen import exporters, families
from leangen.engine import Engine
from leangen.errors import RequestError, SourceError, UnsupportedError
from leangen.exporters.encoder_decoders import ENCODER_DECODERS
from leangen.families import text_to_text, transcription
from leangen.quantize import quantize
from leangen.session import Session

CASES = [
    pytest.param(kind, options, id=f"{kind}-{i}" if i else kind)
    for kind in ENCODER_DECODERS
    for i, options in enumerate(VARIANTS[kind])
]
TEXTS = ("t5", "mt5")


def sound(seed=0, seconds=1.0):
    rng = np.random.default_rng(seed)
    return (rng.standard_normal(int(16_000 * seconds)) / 10).astype(np.float32)


def asked(kind, **options):
    """Options of a request for a model of that kind."""
    if kind in TEXTS:
        return {"tokens": [5, 6, 7, 8, 2], "ignore_eos": True, **options}
    return {"audio": sound(), **options}


@pytest.mark.parametrize(("kind", "options"), CASES)
def test_check_finds_what_torch_computes(tmp_path, kind, options):
    checkpoint(tmp_path / "saved", kind, options)
    source = tmp_path / "saved" / "config.json"  # stands for its folder
    bundle = exporters.export(source, tmp_path / "bundle")
    found = exporters.check(source, bundle)
    assert len(found) == 2
    for difference in found:
        assert difference.passed, difference
        assert difference.scale > 1


@pytest.mark.parametrize(("kind", "options"), [case for case in CASES if "t5" in case.id])
def test_greedy_text_is_theirs(tmp_path, kind, options):
    model = checkpoint(tmp_path / "saved", kind, options)
    session = Session(exporters.export(tmp_path / "saved", tmp_path / "bundle"), threads=1)
    for length in (1, 40):
        prompt = np.random.default_rng(length).integers(3, VOCAB, length).tolist()
        request = text_to_text.Request(tokens=prompt, max_new_tokens=64, ignore_eos=True)
        written = [token for step in text_to_text.run(session, request) for token in step.tokens]
        with torch.no_grad():
            rows = model.double()(
                input_ids=torch.tensor([prompt]), decoder_input_ids=torch.tensor([[0, *written]])
            ).logits[0, :-1]
        assert len(written) == 64
        for row, token in zip(rows.numpy(), written, strict=True):
            assert row[token] >= row.max() - 1e-4 * max(1, np.abs(row).max())
        model.float()
        theirs = model.generate(  # its cache has as many layers as the encoder, so without one
            torch.tensor([prompt]), max_new_tokens=20, do_sample=False, eos_token_id=None,
            pad_token_id=0, use_cache=False,
        )  # fmt: skip
        assert theirs[0, 1:].tolist() == written[:20]


@pytest.mark.parametrize(("multilingual", "beams"), [(False, 1), (True, 1), (True, 4)])
def test_transcripts_are_theirs(tmp_path, multilingual, beams):
    model = checkpoint(tmp_path / "saved", "whisper", WHISPER, multilingual=multilingual)
    session = Session(exporters.export(tmp_path / "saved", tmp_path / "bundle"), threads=1)
    config = session.bundle.config
    assert bool(config["languages"]) == multilingual
    prompt = [1, 4, 81, 82] if multilingual else [1, 82]
    spoken = "de" if multilingual else None
    request = transcription.Request(audio=sound(), language=spoken, max_new_tokens=40, beams=beams)
    written = [token for step in transcription.run(session, request) for token in step.tokens]
    features = transcription.features(config, sound()[: config["window_samples"]])
    theirs = model.generate(
        torch.from_numpy(features), decoder_input_ids=torch.tensor([prompt]), max_new_tokens=40,
        num_beams=beams, do_sample=False, eos_token_id=2, pad_token_id=0, decoder_start_token_id=1,
        suppress_tokens=[7, 9, *range(83, VOCAB)], begin_suppress_tokens=[2, 11],
        return_timestamps=False,
    )[0].tolist()  # fmt: skip
    theirs = theirs[len(prompt) :] if theirs[: len(prompt)] == prompt else theirs
    if 2 in theirs:
        theirs = theirs[: theirs.index(2)]
    ended = written[:-1] if written[-1] == 2 else written
    assert ended == theirs
    assert not set(written) & {7, 9, *range(83, VOCAB)}


@pytest.mark.parametrize("kind", ENCODER_DECODERS)
@pytest.mark.parametrize("scheme", ["int8", "int4"])
def test_every_one_quantizes_and_generates_with_a_receipt(tmp_path, kind, scheme):
    checkpoint(tmp_path / "saved", kind, VARIANTS[kind][0])
    bundle = exporters.export(tmp_path / "saved", tmp_path / "fp32")
    low = quantize(bundle, scheme, tmp_path / scheme)
    assert low.quantization["weights_8bit_or_fewer"] > 0.9
    engine = Engine(Session(low, threads=1), baseline_s=0)
    result = engine.generate(**asked(kind, max_new_tokens=4))
    assert 0 < len(result.tokens) <= 4
    assert result.receipt.scheme == scheme
    assert result.receipt.units.kind == families.of(low).UNIT
    assert result.receipt.units.count == (4 if kind in TEXTS else 1.0)


def test_methods_that_calibrate_are_refused(tmp_path):
    checkpoint(tmp_path / "saved", "t5", VARIANTS["t5"][0])
    bundle = exporters.export(tmp_path / "saved", tmp_path / "fp32")
    with pytest.raises(RequestError, match="makes none itself: give --data"):
        quantize(bundle, "int4-gptq", tmp_path / "low")


@pytest.fixture(scope="module")
def text_model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("t5")
    checkpoint(folder / "saved", "t5", VARIANTS["t5"][0])
    return Session(exporters.export(folder / "saved", folder / "bundle"), threads=1)


def test_text_to_text_samples_and_searches(text_model):
    def text(**options):
        steps = text_to_text.run(text_model, text_to_text.Request(tokens=[5, 6, 2], **options))
        return [tuple(step.tokens) for step in steps]

    drawn = {"max_new_tokens": 12, "temperature": 1.0, "seed": 3}
    assert text(**drawn) == text(**drawn) != text(**drawn | {"seed": 4})
    assert len(text(max_new_tokens=8, n=2, temperature=1.0)) > 8
    assert sum(map(len, text(max_new_tokens=8, beams=3, ignore_eos=True))) == 8
    for options, told in (
        ({"prefix_cache": True}, "prefix_cache is for decoders alone"),
        ({"tokens": [5] * 600}, "600 tokens and the encoder takes 512"),
        ({"tokens": [VOCAB]}, "not in the vocabulary"),
    ):
        with pytest.raises(RequestError, match=told):
            list(text_to_text.run(text_model, text_to_text.Request(**{"tokens": [5], **options})))


def test_what_does_not_fit_is_named(tmp_path):
    folder = tmp_path / "saved"
    checkpoint(folder, "t5", VARIANTS["t5"][0])
    config = json.loads((folder / "config.json").read_text())

    def with_config(**changes):
        (folder / "config.json").write_text(json.dumps(config | changes))

    with_config(num_layers=4, d_ff=95)
    with pytest.raises(SourceError, match=r"encoder\.block\.2\..* is missing.* more"):
        exporters.export(folder, tmp_path / "out")
    with_config(feed_forward_proj="gated-mish")
    with pytest.raises(UnsupportedError, match="activation 'mish'"):
        exporters.export(folder, tmp_path / "out")
    with_config(model_type="t6")
    with pytest.raises(UnsupportedError, match="'t6'.*the nearest is t5"):
        exporters.export(folder, tmp_path / "out")
    del config["d_kv"]
    with_config()
    with pytest.raises(SourceError, match="lacks 'd_kv', which a t5 has"):
        exporters.export(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()
