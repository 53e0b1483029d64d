"""Verify: a flipped byte anywhere, a swapped part, a graph that computes something else."""

import json
import os
import random
import shutil

import leangen_kernels
import numpy as np
import pytest
from gguf_fixtures import write
from test_cli import fails
from test_llm_graph import LOW_BIT
from test_pipeline import TWO_WRITERS
from tiny_bundles import BUILDERS, language

from leangen import families, probe, quantize, verification
from leangen.bundle import CHECKSUM, MANIFEST, open_bundle, sha256_file
from leangen.cli import main
from leangen.errors import BundleError
from leangen.exporters import gguf
from leangen.lowering import cache
from leangen.session import Session


@pytest.fixture(scope="module", params=sorted(families.FAMILIES))
def bundle(request, tmp_path_factory):
    """A tiny bundle of each family with its probe."""
    return probe.attach(BUILDERS[request.param](tmp_path_factory.mktemp("bundle")))


def verify(bundle, **options):
    return list(verification.verify(open_bundle(bundle.path), **options))


def test_a_whole_bundle_passes_and_has_a_probe(bundle):
    lines = verify(bundle)
    assert lines[0].startswith(f"{len(bundle.files)} files as the manifest says")
    probed = [line for line in lines if "off its fp32 reference" in line]
    assert len(probed) >= 1 and not any("no numeric probe" in line for line in lines)


def test_a_flipped_bit_in_any_file_is_found(bundle, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(bundle.path, copy)
    rng = random.Random(7)
    for path in sorted(p for p in copy.rglob("*") if p.is_file() and ".lowered" not in p.parts):
        content = path.read_bytes()
        places = {0, len(content) - 1, *(rng.randrange(len(content)) for _ in range(12))}
        for place in sorted(places):
            flipped = bytearray(content)
            flipped[place] ^= 1 << rng.randrange(8)
            path.write_bytes(flipped)
            with pytest.raises(BundleError):
                list(verification.verify(open_bundle(copy)))
        path.write_bytes(content)
    verify(open_bundle(copy))


def test_the_checksum_is_what_sha256sum_reads(bundle):
    import hashlib

    told = (bundle.path / CHECKSUM).read_text()
    assert told == f"{hashlib.sha256((bundle.path / MANIFEST).read_bytes()).hexdigest()}  " + (
        f"{MANIFEST}\n"
    )


def test_a_graph_that_is_off_is_found(bundle, monkeypatch):
    """Whatever computes it: here every output is 2% too large."""
    from leangen.families import decoder

    run, feed = Session.run, decoder.Decoder.feed
    monkeypatch.setattr(
        Session, "run", lambda *args: [value * np.float32(1.02) for value in run(*args)]
    )
    monkeypatch.setattr(
        decoder.Decoder, "feed", lambda self, tokens: feed(self, tokens) * np.float32(1.02)
    )
    with pytest.raises(BundleError, match=r"is 0\.0\d+ off its reference .*expected at most 0.001"):
        verify(bundle)


@pytest.mark.parametrize("scheme", ["int8", "int4"])
@pytest.mark.parametrize("family", ["language", "oneshot"])
def test_a_quantized_bundle_is_held_against_fp32(family, scheme, tmp_path):
    bundle = probe.attach(BUILDERS[family](tmp_path / "made"))
    low = quantize.quantize(bundle, scheme, tmp_path / "low")
    reference, _ = probe._read(bundle)
    kept, at_export = probe._read(low)
    for role, (_, outputs) in reference.items():
        for name, value in outputs.items():
            assert np.array_equal(kept[role][1][name], value)
    assert max(at_export.values()) > 0
    verify(low)
    verify(low, kernels="ort")


@pytest.mark.skipif(leangen_kernels.library() is None, reason="no kernels were built")
def test_a_lowering_that_is_off_is_found(tmp_path):
    """Lowered weights that were changed together with their hashes: only the numbers tell."""
    source = write(tmp_path / "tiny.gguf", LOW_BIT["Q4_1"])
    low = probe.attach(gguf.export(source, tmp_path / "low", form="gguf"))
    Session(low).graph("model")
    verify(low)
    (manifest,) = next(root for root in cache.roots(low) if root.is_dir()).glob("*/lowered.json")
    entries = json.loads(manifest.read_text())
    data = manifest.parent / "model.onnx.data"
    values = bytearray(data.read_bytes())
    values[: len(values) // 2] = bytes(byte ^ 0x11 for byte in values[: len(values) // 2])
    data.write_bytes(values)
    entries["files"][data.name]["sha256"] = sha256_file(data)
    manifest.write_text(json.dumps(entries))
    with pytest.raises(BundleError, match="graph 'model' is .* off its reference"):
        verify(low)
    verify(low, kernels="ort")


def test_operators_of_other_domains_are_named(tmp_path):
    import onnx

    made = BUILDERS["oneshot"](tmp_path)
    path = made.graph("model")
    model = onnx.load(path)
    model.graph.node[0].domain = "leangen"
    model.opset_import.append(onnx.helper.make_opsetid("leangen", 1))
    onnx.save(model, path)
    with pytest.raises(BundleError, match="MatMul of domain 'leangen'"):
        verification.check_graph(made, "model")


def test_a_graph_that_the_checker_refuses_is_named(tmp_path):
    import onnx

    made = BUILDERS["oneshot"](tmp_path)
    model = onnx.load(made.graph("model"), load_external_data=False)
    model.graph.node[0].input[0] = "nothing"
    onnx.save(model, made.graph("model"))
    with pytest.raises(BundleError, match="graph 'model' is not valid: .*nothing"):
        verification.check_graph(made, "model")


def test_a_store_of_hard_links_passes(bundle, tmp_path):
    shutil.copytree(bundle.path, tmp_path / "linked", copy_function=os.link)
    verify(open_bundle(tmp_path / "linked"))


def test_a_model_too_large_for_the_machine_gets_no_probe(tmp_path, monkeypatch):
    monkeypatch.setattr(probe, "_memory_bytes", lambda: 1000)
    made = probe.attach(BUILDERS["oneshot"](tmp_path))
    assert probe.FILE not in made.files
    assert "no numeric probe" in verify(made)[-1]


def test_a_damaged_probe_is_named(tmp_path):
    made = probe.attach(BUILDERS["oneshot"](tmp_path))
    (made.path / probe.FILE).write_bytes(b"PK" + b"0" * (made.files[probe.FILE]["bytes"] - 2))
    with pytest.raises(BundleError, match=r"probe.npz is damaged .*: pull or export"):
        probe.check(Session(made))


def test_the_command_line_says_where(tmp_path, capsys):
    made = probe.attach(language(tmp_path))
    assert main(["verify", str(made.path)]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"tiny:fp32 {made.digest}") and "graph model: " in out
    data = made.path / "model.onnx.data"
    content = bytearray(data.read_bytes())
    content[5] ^= 1
    data.write_bytes(content)
    assert "'model.onnx.data' has sha256" in fails(capsys, "verify", str(made.path))


def test_a_swapped_part_of_a_pipeline_is_named(tmp_path, capsys):
    made = probe.attach(language(tmp_path / "made"))
    made.path.rename(tmp_path / "language")
    path = tmp_path / "two.toml"
    pinned = 'model = "./language"\n' + f'bundle = "{made.digest}"'
    path.write_text(TWO_WRITERS.replace('model = "./language"', pinned, 1))
    assert main(["verify", str(path)]) == 0
    assert "first and second fit together" in capsys.readouterr().out
    other = quantize.quantize(open_bundle(tmp_path / "language"), "int8", tmp_path / "low")
    shutil.rmtree(tmp_path / "language")
    other.path.rename(tmp_path / "language")
    assert "it was swapped or made anew" in fails(capsys, "verify", str(path))
