"""How keys and values are kept: in 32, 16 or 8 bits, as a scheme or whoever loads it says."""

import json

import leangen_kernels
import numpy as np
import pytest
from tiny_bundles import BUILDERS
from transformers_models import SMALL, VOCAB, checkpoint

from leangen import exporters
from leangen.cli import main
from leangen.errors import RequestError, UnknownSchemeError
from leangen.families import key_values, language
from leangen.families.decoder import Decoder
from leangen.precision import parse
from leangen.quantize import quantize
from leangen.session import Session

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    folder = tmp_path_factory.mktemp("kv")
    checkpoint(folder / "saved", "llama", {**SMALL, "head_dim": 32})
    bundle = exporters.export(folder / "saved", folder / "fp32")
    return {scheme: quantize(bundle, scheme, folder / scheme) for scheme in ("int8", "int8-kv8")}


def tokens(count):
    return np.random.default_rng(1).integers(0, VOCAB, count).tolist()


def logits(bundle, count=100, **options):
    session = Session(bundle, threads=1, **options)
    return language.logits(session, tokens(count)), session.reasons["kv"]


def test_fewer_bits_take_less_memory_and_lose_little(made):
    exact, why = logits(made["int8"], kv="fp32", activations="fp32")
    assert why == "fp32: asked for"
    moved, sizes = {}, {}
    for kv in ("fp16", "int8"):
        found, why = logits(made["int8"], kv=kv, activations="fp32")
        assert why == f"{kv}: asked for"
        moved[kv] = np.linalg.norm(found - exact) / np.linalg.norm(exact)
    for kv in ("fp32", "fp16", "int8"):
        cache = key_values.allocate(Session(made["int8"], kv=kv), 1, 256)
        sizes[kv] = cache.array.nbytes
    assert 0 < moved["fp16"] < 1e-3 < moved["int8"] < 0.05
    assert sizes["fp16"] * 2 == sizes["fp32"]
    assert sizes["int8"] * 32 * 4 == sizes["fp32"] * (32 + 4)


def test_a_scheme_says_it_and_whoever_loads_the_model_may_say_otherwise(made):
    assert made["int8-kv8"].config["kv"] == "int8"
    found, why = logits(made["int8-kv8"])
    assert why == "int8: the bundle's scheme, int8-kv8"
    np.testing.assert_array_equal(found, logits(made["int8"], kv="int8")[0])
    assert logits(made["int8-kv8"], kv="fp16")[1] == "fp16: asked for"
    assert logits(made["int8"])[1].startswith("fp16: rounding to 11 bits")
    assert logits(made["int8"], activations="fp32")[1] == "fp32: as activations are"


def test_onnxruntimes_attention_says_what_it_keeps(made):
    found, why = logits(made["int8-kv8"], kernels="ort")
    assert why.startswith("fp32: ONNX Runtime's attention runs, which keeps no int8")
    np.testing.assert_array_equal(found, logits(made["int8"], kernels="ort")[0])


@pytest.mark.parametrize("kv", ["fp32", "fp16", "int8"])
def test_decoding_token_by_token_and_forks_see_the_same(made, kv):
    session, ids = Session(made["int8"], threads=1, kv=kv), tokens(40)
    whole = language.logits(session, ids)
    with Decoder(session, 64) as decoder:
        decoder.feed(ids[:19])
        rows = [decoder.feed([token]).copy() for token in ids[19:30]]
        fork = decoder.fork(session)
        rows += [fork.feed([token]).copy() for token in ids[30:]]
    np.testing.assert_allclose(rows, whole[19:], atol=1e-4 * np.abs(whole).max())


def test_the_command_and_its_receipt(made, capsys):
    command = ["generate", str(made["int8"].path), "--prompt", "a b", "--max-new-tokens", "4"]
    assert main([*command, "--kv", "int8", "--json"]) == 0
    receipt = json.loads(capsys.readouterr().out)["receipt"]
    assert receipt["runtime"]["reasons"]["kv"] == "int8: asked for"


def test_what_keeps_no_keys_is_refused(made, tmp_path):
    flow = BUILDERS["flow/density"](tmp_path / "f")
    with pytest.raises(RequestError, match="keeps no keys and values: leave out --kv"):
        Session(flow, kv="int8")
    with pytest.raises(RequestError, match="kv is 'int4', expected fp32, fp16, int8"):
        Session(made["int8"], kv="int4")
    with pytest.raises(UnknownSchemeError, match="leave out -kvN"):
        quantize(flow, "int4-kv8", tmp_path / "o")
    with pytest.raises(UnknownSchemeError, match="fp16 has no -kvN"):
        parse("fp16-kv8")
    assert str(parse("int4-g128-e4-kv8-rot-gptq")) == "int4-g128-e4-kv8-rot-gptq"
