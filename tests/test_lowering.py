"""Lowered models compute what the bundle says, and the cache of them is never half of one."""

import errno
import json
import os
import signal
import subprocess
import sys
import threading
from contextlib import suppress

import leangen_kernels
import lowered_graphs
import numpy as np
import pytest
import tiny_bundles
from decoder_twin import Twin
from gguf_fixtures import Tiny, write
from test_llm_graph import LOW_BIT, VARIANTS, assert_same_logits, some_tokens

from leangen import bundle as bundles
from leangen import cli, lowering
from leangen.engine import Engine
from leangen.errors import BundleError, RequestError, UnknownSchemeError
from leangen.exporters import gguf
from leangen.families import key_values, language
from leangen.families.decoder import Decoder
from leangen.lowering import cache, linear
from leangen.quantize import quantize
from leangen.session import Session

pytestmark = pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)
Q4_1 = LOW_BIT["Q4_1"]


def export(folder, tiny=Q4_1):
    return gguf.export(write(folder / "tiny.gguf", tiny), folder / "bundle", form="gguf")


def both(bundle, **options):
    """Sessions on leangen's kernels and on ORT's."""
    return [Session(bundle, threads=1, kernels=kernels, **options) for kernels in ("auto", "ort")]


def ops(session, role="model"):
    """The operators of the graph that a session runs."""
    lowered, _ = lowering.find(session.bundle, role)
    return lowered_graphs.operators(lowered.path)


@pytest.mark.parametrize("variant", LOW_BIT)
def test_with_fp32_activations_logits_are_those_of_ort(tmp_path, variant):
    bundle = export(tmp_path, LOW_BIT[variant])
    tokens = some_tokens(LOW_BIT[variant])
    ours, stock = both(bundle, activations="fp32")
    expected = language.logits(stock, tokens)
    assert_same_logits(language.logits(ours, tokens), expected)
    with Decoder(ours, len(tokens)) as sequence:
        sequence.feed(tokens[:17])
        fed = [sequence.feed([tokens[i]]).copy() for i in range(17, len(tokens))]
    assert_same_logits(np.array(fed), expected[17:])
    assert "Linear" in ops(ours) and ours.kernels == leangen_kernels.status()[0]
    assert (
        stock.kernels == "ort" and stock.reasons["kernels"] == "ONNX Runtime's own were asked for"
    )


@pytest.mark.parametrize(
    ("variant", "form"),
    {
        "Q4_0": "q4",
        "Q4_1": "q4_min",
        "Q5_0": "q5",
        "Q5_1": "q5_min",
        "Q8_0": "q8",
        "Q4_K": "q4_min_split",
        "Q5_K": "q5_min_split",
        "Q6_K": "q6_g16_split",
    }.items(),
)
def test_weights_keep_their_bits(tmp_path, variant, form):
    session = Session(export(tmp_path, LOW_BIT[variant]), threads=1)
    lowered, _ = lowering.find(session.bundle, "model")
    assert set(lowered_graphs.forms(lowered.path)) == {form}


@pytest.mark.parametrize("variant", ["5 and 8 bits", "5 and 8 bits, biases"])
def test_layers_side_by_side_that_differ_in_bits_become_one(tmp_path, variant):
    session = Session(export(tmp_path, LOW_BIT[variant]), threads=1)
    session.graph("model")
    assert "Concat" not in ops(session)
    lowered, _ = lowering.find(session.bundle, "model")
    assert lowered_graphs.forms(lowered.path) == ["q8", *["q5"] * 8]


def test_layers_side_by_side_stay_where_joining_them_reads_much_more(tmp_path, monkeypatch):
    monkeypatch.setattr(linear, "JOIN_BYTES", 100)
    session = Session(export(tmp_path, LOW_BIT["5 and 8 bits"]), threads=1)
    session.graph("model")
    assert "Concat" in ops(session)


@pytest.mark.parametrize(
    "variant",
    ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "untied", "biases", "Q4_K", "5 and 8 bits"],
)
def test_logits_are_those_of_the_numpy_twin(tmp_path, variant):
    tiny = LOW_BIT[variant]
    session = Session(export(tmp_path, tiny), threads=1)
    exact = variant not in ("Q5_0", "Q5_1", "Q8_0", "5 and 8 bits")
    twin = Twin(tmp_path / "tiny.gguf", exact_last_mlp=exact)
    # An activation that falls between two int8 codes may go either way in fp32 and float64, and
    # then all that follows differs a little: short texts, of which a few may differ.
    texts = [some_tokens(tiny, 3) for _ in range(20)]
    apart = [np.abs(language.logits(session, text) - twin.logits(text)).max() for text in texts]
    assert np.quantile(apart, 0.8) < 1e-4
    exact = Twin(tmp_path / "tiny.gguf", activations="fp32")
    assert np.abs(exact.logits(texts[0]) - twin.logits(texts[0])).max() > 1e-2


def test_a_decoder_is_linear_and_attention_alone(tmp_path):
    session = Session(export(tmp_path, VARIANTS["low bit"]), threads=1)
    session.graph("model")
    found = ops(session)
    assert found.count("Linear") == 2 * 4 + 1 and found.count("Attention") == 2
    assert len(found) == found.count("Linear") + found.count("Attention") + 3  # embedding, slices
    assert session.reasons["kernels"].endswith("nodes replaced: 9 by linear, 2 by language")


def test_keys_and_values_are_kept_in_fp16_unless_activations_are_exact(tmp_path):
    bundle = export(tmp_path)
    for activations, kept in (("int8", np.float16), ("fp32", np.float32)):
        session = Session(bundle, threads=1, activations=activations)
        caches = key_values.allocate(session, rows=2, capacity=32).array
        assert caches.dtype == kept
        assert caches.shape == (2, 2, 2, Q4_1.kv_heads, 32, Q4_1.head_dim)


def test_a_bundle_that_leangen_quantized_is_lowered_whole(tmp_path):
    fp32 = gguf.export(write(tmp_path / "tiny.gguf", Tiny()), tmp_path / "fp32")
    tokens = some_tokens(Tiny())
    for scheme in ("int8", "int4"):
        bundle = quantize(fp32, scheme, tmp_path / scheme)
        ours, stock = both(bundle, activations="fp32")
        got, expected = language.logits(ours, tokens), language.logits(stock, tokens)
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-3)
        assert not {"MatMulNBits", "MatMul", "GroupQueryAttention", "Reshape"} & set(ops(ours))


@pytest.mark.parametrize("family", tiny_bundles.BUILDERS)
def test_every_family_runs_as_before(tmp_path, family):
    bundle = tiny_bundles.BUILDERS[family](tmp_path)
    with suppress(UnknownSchemeError):  # too small to be worth it
        bundle = quantize(bundle, "int8", tmp_path / "int8")
    outputs = []
    for session in both(bundle, activations="fp32"):
        engine = Engine(session, baseline_s=0)
        result = engine.generate(**tiny_bundles.OPTIONS[family])
        outputs.append(np.asarray(result.tokens if result.array is None else result.array))
        assert result.receipt.runtime.kernels == session.kernels
    # Convolutions round activations: other draws.
    if family in ("autoregressive/audio", "autoregressive/rows"):
        assert outputs[0].shape == outputs[1].shape
        return
    scale = max(1.0, np.abs(outputs[1]).max())
    np.testing.assert_allclose(outputs[0], outputs[1], rtol=0, atol=1e-3 * scale)


def test_a_model_without_low_bit_weights_stays_with_ort(tmp_path):
    session = Session(tiny_bundles.language(tmp_path), threads=1)
    session.graph("model")
    assert session.kernels == "ort"
    assert session.reasons["kernels"] == "ONNX Runtime's own: leangen's kernels fit no node of it"
    assert not list(session.bundle.path.glob(".lowered/*/*.onnx"))


def test_the_number_of_threads_changes_no_bit(tmp_path):
    bundle, tokens = export(tmp_path), some_tokens(Q4_1, 100)
    first, *others = [language.logits(Session(bundle, threads=n), tokens) for n in (1, 2, 4)]
    for other in others:
        np.testing.assert_array_equal(other, first)


def test_two_models_and_four_threads(tmp_path):
    sessions = [Session(export(tmp_path / name, LOW_BIT[name])) for name in ("Q4_1", "Q8_0")]
    tokens = [some_tokens(Q4_1, 30) for _ in range(4)]

    def text(session, prompt):
        with Decoder(session, 60) as sequence:
            found = [int(sequence.feed(prompt).argmax())]
            for _ in range(25):
                found.append(int(sequence.feed([found[-1]]).argmax()))
        return found

    alone = [[text(session, prompt) for prompt in tokens] for session in sessions]
    found = {}

    def work(index):
        for _ in range(3):
            found[index] = [text(session, tokens[index]) for session in sessions]

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [found[i] for i in range(4)] == [list(pair) for pair in zip(*alone, strict=True)]


def test_kernels_can_be_switched_off(tmp_path, monkeypatch):
    bundle = export(tmp_path)
    monkeypatch.setenv("LEANGEN_KERNELS", "off")
    session = Session(bundle)
    session.graph("model")
    assert session.kernels == "ort"
    assert "LEANGEN_KERNELS=off" in session.reasons["kernels"]
    with pytest.raises(RequestError, match="kernels is 'cuda', expected 'auto' or 'ort'"):
        Session(bundle, kernels="cuda")


# The cache


def entries(bundle):
    return sorted(path for path in (bundle.path / cache.FOLDER).iterdir() if path.is_dir())


def load(bundle, **options):
    session = Session(bundle, threads=1, **options)
    session.graph("model")
    return session


def test_a_warm_start_imports_no_onnx(tmp_path):
    bundle = export(tmp_path)
    load(bundle)
    script = f"""
import sys
from pathlib import Path
from leangen.bundle import open_bundle
from leangen.families import key_values, language
from leangen.session import Session
session = Session(open_bundle(Path({str(bundle.path)!r})))
list(language.run(session, language.Request(tokens=[5], max_new_tokens=2)))
print(session.kernels, sorted({{"onnx", "filelock", "numba"}} & sys.modules.keys()))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.stdout == f"{leangen_kernels.status()[0]} []\n", done.stderr


def test_it_is_made_once_and_serves_both_kinds_of_activations(tmp_path, monkeypatch):
    bundle = export(tmp_path)
    load(bundle)
    monkeypatch.setattr(lowering, "_lower", lambda *_: pytest.fail("made again"))
    assert load(bundle).kernels == load(bundle, activations="fp32").kernels != "ort"
    assert len(entries(bundle)) == 1


def test_a_stale_one_is_replaced(tmp_path, monkeypatch):
    bundle = export(tmp_path)
    load(bundle)
    old = entries(bundle)
    (bundle.path / cache.FOLDER / ".killed.tmp-1").mkdir()
    monkeypatch.setattr(lowering, "VERSION", lowering.VERSION + 1)
    load(bundle)
    assert len(entries(bundle)) == 1 and entries(bundle) != old


def test_a_damaged_one_is_made_again(tmp_path):
    bundle = export(tmp_path)
    expected = language.logits(load(bundle), [5, 6, 7])
    [entry] = entries(bundle)

    def cut():
        data = entry / "model.onnx.data"
        data.write_bytes(data.read_bytes()[:-1])

    for harm in (cut, (entry / "model.onnx").unlink, (entry / cache.MANIFEST).unlink):
        harm()
        again = load(bundle)
        assert again.kernels != "ort"
        np.testing.assert_array_equal(language.logits(again, [5, 6, 7]), expected)


def test_one_that_does_not_open_is_made_again(tmp_path):
    bundle = export(tmp_path)
    load(bundle)
    [entry] = entries(bundle)
    graph = entry / lowering.file_of(False, "fp16")
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    with pytest.raises(BundleError, match=f"'{graph.name}' is not what was written"):
        cache.verify(bundle)
    assert load(bundle).kernels != "ort"
    cache.verify(bundle)


@pytest.mark.parametrize("times", [1, 2])
def test_one_that_another_version_removes_meanwhile_is_made_again(tmp_path, monkeypatch, times):
    bundle, find, found = export(tmp_path), lowering.find, []

    def find_and_lose(*args, **options):
        lowered, why = find(*args, **options)
        found.append(lowered)
        if len(found) <= times:
            lowered.discard()
        return lowered, why

    monkeypatch.setattr(lowering, "find", find_and_lose)
    session = load(bundle)
    if times == 1:
        assert session.kernels != "ort"
    else:
        assert session.kernels == "ort" and "does not open" in session.reasons["kernels"]
    assert len(found) == 2 and language.logits(session, [5, 6, 7]).shape[0] == 3


def failing(error):
    def fail(path, folder):
        (folder / "model.onnx").write_bytes(b"half")
        raise error

    return fail


def test_a_full_disk_leaves_the_model_to_ort(tmp_path, monkeypatch):
    bundle = export(tmp_path)
    full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(lowering, "_lower", failing(full))
    session = load(bundle)
    assert session.kernels == "ort" and "disk full" in session.reasons["kernels"]
    assert not entries(bundle)


def test_ctrl_c_leaves_nothing(tmp_path, monkeypatch):
    bundle = export(tmp_path)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(lowering, "_lower", failing(KeyboardInterrupt()))
        load(bundle)
    assert not entries(bundle)
    assert load(bundle).kernels != "ort"


SLOW = """
import sys, time
from pathlib import Path
from leangen import lowering
from leangen.bundle import open_bundle
from leangen.session import Session
really = lowering._lower
def slow(path, folder):
    counts = really(path, folder)
    print("making", flush=True)
    time.sleep(float(sys.argv[2]))
    return counts
lowering._lower = slow
session = Session(open_bundle(Path(sys.argv[1])))
session.graph("model")
print(session.kernels, flush=True)
"""


def start(bundle, seconds):
    command = [sys.executable, "-c", SLOW, str(bundle.path), str(seconds)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, text=True)


def test_a_second_process_waits_for_the_first_and_a_killed_one_does_no_harm(tmp_path):
    bundle = export(tmp_path)
    killed = start(bundle, 60)
    assert killed.stdout.readline() == "making\n"
    killed.send_signal(signal.SIGKILL)
    killed.communicate()
    two = [start(bundle, 0.5) for _ in range(2)]
    said = sorted(process.communicate()[0].split() for process in two)
    variant = leangen_kernels.status()[0]
    assert sorted(said, key=len) == [[variant], ["making", variant]]
    assert [path.name[0] for path in entries(bundle)] == ["m"]


def test_beside_a_read_only_bundle_it_lies_in_the_store(tmp_path, home):
    bundle = export(tmp_path)
    (bundle.path / cache.FOLDER).write_text("no folder can be made here")
    assert load(bundle).kernels == load(bundle).kernels != "ort"
    assert list(home.glob("lowered/*/model-*/model.onnx"))
    (home / "lowered").rename(home / "gone")
    (home / "lowered").write_text("nor here")
    session = load(bundle)
    assert session.kernels == "ort"
    assert "set LEANGEN_HOME to a folder that can be written" in session.reasons["kernels"]


def test_the_store_counts_verifies_and_removes_it(tmp_path, home, capsys):
    bundle = gguf.export(write(tmp_path / "t.gguf", Q4_1), home / "models" / "mine" / "gguf",
                         form="gguf")  # fmt: skip
    load(bundle)

    def run(*command):
        assert cli.main([*command]) == 0
        return capsys.readouterr().out

    rows = {row["what"]: row["bytes"] for row in json.loads(run("du", "--json"))}
    beside = (bundles.MANIFEST, bundles.CHECKSUM)
    on_disk = bundle.size_bytes + sum((bundle.path / name).stat().st_size for name in beside)
    assert rows["mine:gguf"] == on_disk
    assert rows["mine:gguf (lowered)"] > on_disk / 2
    assert "9 lowered ones as they were written" in run("verify", str(bundle.path))
    assert cache.FOLDER in run("gc", "--dry-run") and entries(bundle)
    run("gc")
    assert not (bundle.path / cache.FOLDER).exists()
    assert load(bundle).kernels != "ort"
    run("rm", "mine:gguf")
    assert not bundle.path.exists()


def test_the_command_line_takes_kernels(tmp_path, capsys):
    bundle = export(tmp_path)
    for kernels, expected in (("ort", "ort"), ("auto", leangen_kernels.status()[0])):
        command = ["generate", str(bundle.path), "--prompt", "hello", "--max-new-tokens", "2"]
        assert cli.main([*command, "--json", "--kernels", kernels]) == 0
        receipt = json.loads(capsys.readouterr().out)["receipt"]
        assert receipt["runtime"]["kernels"] == expected
