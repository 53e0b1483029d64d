"""Generating from the command line, on tiny bundles addressed by path."""

import json
import subprocess
import sys
import wave

import pytest
from test_cli import fails
from tiny_bundles import density, language, speech

from leangen.cli import main


@pytest.fixture(scope="module")
def bundles(tmp_path_factory):
    folder = tmp_path_factory.mktemp("bundles")
    return {
        "language": str(language(folder / "language").path),
        "speech": str(speech(folder / "speech").path),
        "density": str(density(folder / "density").path),
    }


def test_json_is_one_object_with_text_and_receipt(bundles, capsys):
    argv = ["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "4", "--json"]
    assert main([*argv, "--ignore-eos"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert isinstance(document["text"], str)
    energy, latency = document["receipt"]["energy"], document["receipt"]["latency"]
    assert {"gross_j", "u_j", "source", "scope"} <= set(energy)
    assert 0 < latency["ttft_s"] <= latency["total_s"]
    assert document["receipt"]["units"] == {"kind": "token", "count": 4, "prompt": 2}


def test_text_goes_to_stdout_and_the_cost_to_stderr(bundles, capsys):
    assert main(["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "4"]) == 0
    captured = capsys.readouterr()
    assert " J" in captured.err and " J" not in captured.out


def test_samples_and_log_probabilities_in_json(bundles, capsys):
    argv = ["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "3", "--json"]
    options = ["--ignore-eos", "--n", "2", "--logprobs", "2", "--temperature", "1"]
    assert main([*argv, *options, "--logit-bias", "5=-inf", "--min-p", "0.01"]) == 0
    document = json.loads(capsys.readouterr().out)
    first, second = document["samples"]
    assert first["text"] == document["text"] and first["tokens"] != second["tokens"]
    for sample in (first, second):
        assert [row["token"] for row in sample["logprobs"]] == sample["tokens"]
        assert all(len(row["likeliest"]) == 2 and row["logprob"] <= 0 for row in sample["logprobs"])
    request = document["receipt"]["request"]
    assert (request["n"], request["logprobs"], request["min_p"]) == (2, 2, 0.01)
    assert request["logit_bias"] == {"5": "-inf"}
    assert document["receipt"]["units"]["count"] == 6


def test_samples_are_told_apart_on_a_terminal(bundles, capsys):
    argv = ["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "3", "--n", "3"]
    assert main([*argv, "--temperature", "1", "--ignore-eos"]) == 0
    assert capsys.readouterr().out.count("\n---\n") == 2


def test_the_receipt_counts_guesses(bundles, capsys):
    argv = ["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "40"]
    assert main([*argv, "--ignore-eos", "--json", "--speculate"]) == 0
    receipt = json.loads(capsys.readouterr().out)["receipt"]
    assert receipt["request"]["speculate"] > 0
    assert 0 < receipt["units"]["accepted"] <= receipt["units"]["guessed"]
    assert receipt["units"]["count"] == 40
    assert main([*argv, "--ignore-eos", "--speculate", "4"]) == 0
    assert " accepted" in capsys.readouterr().err


def test_a_schema_from_a_file(bundles, tmp_path, capsys):
    pytest.importorskip("llguidance", reason="the grammar extra is not installed")
    schema = tmp_path / "schema.json"
    schema.write_text('{"enum": [12, "ab"]}')
    argv = ["generate", bundles["language"], "--prompt", "ab", "--json-schema", str(schema)]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out) in (12, "ab")


def test_speech_is_written_where_asked(bundles, tmp_path, capsys):
    out = tmp_path / "out.wav"
    assert main(["generate", bundles["speech"], "--phonemes", "abc.", "-o", str(out)]) == 0
    assert capsys.readouterr().out.strip() == str(out)
    with wave.open(str(out)) as file:
        assert file.getnframes() > 0


def test_an_unnamed_output_never_overwrites(bundles, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for _ in range(2):
        assert main(["generate", bundles["density"], "--count", "3"]) == 0
    first, second = capsys.readouterr().out.split()
    assert first != second and sorted(path.name for path in tmp_path.glob("*.csv")) == sorted(
        [first, second]
    )


@pytest.mark.parametrize(
    ("which", "options", "words"),
    [
        ("language", ["--prompt", "ab", "--max-new-tokens", "-3"], "max_new_tokens.*-3"),
        ("language", ["--prompt", "ab " * 2000], "prompt has .* tokens.*context"),
        ("language", ["--prompt", "ab", "--temperature", "-1"], "temperature.*-1"),
        ("language", ["--prompt", "ab", "--top-p", "1.5"], "top_p.*1.5"),
        ("language", ["--prompt", "ab", "--min-p", "2"], "min_p is 2.0"),
        ("language", ["--prompt", "ab", "--n", "0"], "n is 0"),
        ("language", ["--prompt", "ab", "--speculate", "-2"], "speculate is -2"),
        ("language", ["--prompt", "ab", "--beams", "2", "--top-k", "3"], "takes no top_k"),
        ("language", ["--prompt", "ab", "--logit-bias", "9999=1"], "token 9999 is not in"),
        ("language", ["--prompt", "ab", "--grammar", "nowhere"], "cannot read --grammar nowhere"),
        ("language", ["--prompt", "ab", "--json-schema", "/"], "cannot read --json-schema /"),
        ("language", ["--prompt", ""], "empty"),
        ("language", [], "prompt"),
        ("language", ["--chat"], "--chat needs a --prompt"),
        ("language", ["--prompt", "ab", "--count", "2"], "takes no option 'count'"),
        ("language", ["--prompt", "ab", "--threads", "0"], "threads is 0"),
        ("language", ["--prompt", "ab", "--region", "atlantis"], "atlantis"),
        ("language", ["--prompt", "ab", "-o", "x.png"], "cannot save text as 'x.png'"),
        ("speech", ["--phonemes", "Q"], "Q"),
        ("speech", ["--phoneme-ids", "9999"], "9999"),
        ("density", ["--count", "0"], "count is 0"),
        ("density", ["--data", "nowhere.csv"], "nowhere.csv"),
    ],
)
def test_requests_that_cannot_be_met_are_one_line(
    bundles, which, options, words, capsys, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    import re

    assert re.search(words, fails(capsys, "generate", bundles[which], *options))
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


def test_a_missing_weight_file_is_named(tmp_path, capsys):
    bundle = language(tmp_path / "language")
    (bundle.path / "model.onnx.data").unlink()
    assert "model.onnx.data" in fails(capsys, "generate", str(bundle.path), "--prompt", "ab")


def test_a_damaged_graph_is_named(tmp_path, capsys):
    bundle = language(tmp_path / "language")
    graph = bundle.path / "model.onnx"
    graph.write_bytes(b"\xff" * graph.stat().st_size)
    assert "model.onnx" in fails(capsys, "generate", str(bundle.path), "--prompt", "ab")


def test_chat_is_for_language_models(bundles, capsys):
    assert "chat needs a language model" in fails(capsys, "chat", bundles["speech"])


def test_a_conversation(bundles):
    done = subprocess.run(
        [sys.executable, "-m", "leangen", "chat", bundles["language"]]
        + ["--max-new-tokens", "5", "--system", "ab"],
        input="ab\n/reset\n\nab\n/quit\n",
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr.count(" tokens in ") == 2
    assert " reused" in done.stderr
    assert "this conversation: " in done.stderr


def test_the_ledger_sums_what_was_generated(bundles, tmp_path, capsys):
    for _ in range(2):
        main(["generate", bundles["density"], "--count", "5", "-o", str(tmp_path / "x.csv")])
    main(["generate", bundles["language"], "--prompt", "ab", "--max-new-tokens", "3"])
    capsys.readouterr()
    assert main(["ledger", "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert sum(row["receipts"] for row in document["summary"]) == len(document["entries"]) == 3
    assert main(["ledger"]) == 0
    assert "estimated" in capsys.readouterr().out or document["entries"][0]["energy"]["source"]


def test_bench_measures_each_model_and_says_how(bundles, capsys):
    argv = ["bench", bundles["density"], bundles["density"], "--repeats", "3", "--json"]
    assert main([*argv, "--count", "50"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert [row["repeats"] for row in document["rows"]] == [3, 3]
    for row in document["rows"]:
        spread = row["total_s"]
        assert 0 < spread["p5"] <= spread["median"] <= spread["p95"]
        assert row["j_per_unit"] is None or row["j_per_unit_u"] > 0
        assert row["energy_source"] in ("measured", "estimated", "unavailable")


def test_bench_wants_a_repeat(bundles, capsys):
    assert "repeats is 0" in fails(capsys, "bench", bundles["density"], "--repeats", "0")
