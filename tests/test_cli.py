"""Bad input: one line that says what to do, exit code 2, nothing left behind."""

import json
import re

import pytest

from leangen.cli import main


def fails(capsys, *argv):
    """Run a command that must fail with 2 and one line; returns that line."""
    assert main(list(argv)) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = [line for line in captured.err.splitlines() if line.startswith("leangen: error: ")]
    assert len(lines) == 1
    return lines[0]


def test_an_unknown_model_suggests_a_near_one(capsys):
    line = fails(capsys, "generate", "smolm2-135m", "--prompt", "x")
    assert "smollm2-135m" in line and "leangen pull --list" in line


def test_an_unknown_scheme_lists_what_there_is(capsys):
    line = fails(capsys, "generate", "terrain:int5")
    assert "'int5'" in line and "int4" in line and "int8" in line


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.gguf", b"GGUF\x03\x00\x00\x00" + b"\x05" * 40),
        ("b.onnx", b"this is not a graph"),
        ("c.txt", b"hello"),
    ],
)
def test_a_source_that_is_not_what_it_says_leaves_nothing(capsys, tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    out = tmp_path / "out"
    line = fails(capsys, "export", str(tmp_path / name), "-o", str(out))
    assert name in line
    assert sorted(path.name for path in tmp_path.iterdir() if path.name != "home") == [name]


def test_a_missing_source_is_named(capsys, tmp_path):
    assert "gone.gguf" in fails(
        capsys, "export", str(tmp_path / "gone.gguf"), "-o", str(tmp_path / "out")
    )


def test_a_folder_that_is_no_bundle(capsys, tmp_path):
    assert "is not a bundle" in fails(capsys, "generate", str(tmp_path))


def test_every_command_has_help_with_an_example(capsys):
    with pytest.raises(SystemExit):
        main(["--help"])
    commands = re.findall(r"^    (\w+) ", capsys.readouterr().out, re.MULTILINE)
    assert {"demo", "generate", "serve", "quantize", "rm", "doctor"} <= set(commands)
    for command in commands:
        with pytest.raises(SystemExit) as stop:
            main([command, "--help"])
        assert stop.value.code == 0
        assert re.search(rf"example:\n  leangen {command}\b", capsys.readouterr().out), command


def test_meters_prints_json(capsys):
    assert main(["meters", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert {"sensor", "status", "source", "scope", "tick_s", "reason", "remedy"} <= set(rows[0])


def test_an_empty_ledger_says_how_to_fill_it(capsys):
    assert main(["ledger"]) == 0
    assert "leangen generate" in capsys.readouterr().out
    assert main(["ledger", "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"summary": [], "entries": []}
