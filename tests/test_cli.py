"""Bad input: one line that says what to do, exit code 2, nothing left behind."""

import io
import json
import re
import signal
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_bundles
from receipt_fakes import receipt

from leangen.cli import main
from leangen.console import table
from leangen.engine import Result
from leangen.records import Output, Step


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


@pytest.mark.parametrize(
    "argv, said",
    [
        (["generate", "terrain", "--steps", "x"], "--steps: 'x' is not a whole number or auto"),
        (["generate", "piper-joe", "--phoneme-ids", "1 x"], "--phoneme-ids: '1 x' is not whole"),
        (["ledger", "--last", "-1"], "--last: '-1' is not a whole number, 0 or more"),
        (["budget", "set", "year", "--joules", "1"], "'year'"),
        (["nonsense"], "'nonsense'"),
    ],
)
def test_options_that_make_no_sense_are_one_line(capsys, argv, said):
    with pytest.raises(SystemExit) as stop:
        main(argv)
    assert stop.value.code == 2
    [line] = capsys.readouterr().err.splitlines()
    assert line.startswith("leangen") and said in line and line.endswith("--help")


def test_what_is_no_head_is_not_taken_for_a_cut_tail(capsys):
    line = fails(capsys, "ledger", "verify", "--head", "nonsense")
    assert "'nonsense', expected the 64 hex digits" in line


class _Full(io.RawIOBase):
    def writable(self):
        return True

    def write(self, data):
        raise OSError(28, "No space left on device")


def test_an_output_that_is_full_is_one_line(capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(_Full(), write_through=True))
    assert main(["ledger", "head"]) == 2
    line = capsys.readouterr().err.strip()
    assert line == "leangen: error: standard output: No space left on device"


@pytest.mark.parametrize("argv", [["meters"], ["meters", "--json"]])
def test_an_output_without_unicode_gets_escapes(monkeypatch, argv):
    ascii_only = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", ascii_only)
    assert main(argv) == 0
    ascii_only.flush()
    told = ascii_only.buffer.getvalue().decode("ascii")
    assert json.loads(told) if "--json" in argv else "\\xb160%" in told


def test_without_memory_a_command_says_so(capsys, monkeypatch):
    def hungry(self, *args, **options):
        raise MemoryError

    monkeypatch.setattr("leangen.store.Store.__init__", hungry)
    assert "not memory enough" in fails(capsys, "du")


def test_what_was_made_is_handed_over_where_the_ledger_cannot_keep_it(capsys, tmp_path):
    bundle = tiny_bundles.BUILDERS["diffusion"](tmp_path / "bundle")
    (tmp_path / "home").mkdir(exist_ok=True)
    (tmp_path / "home" / "ledger.sqlite").mkdir()  # nothing can be written there
    out = tmp_path / "out.npy"
    assert main(["generate", str(bundle.path), "-o", str(out), "--json"]) == 2
    captured = capsys.readouterr()
    assert json.loads(captured.out)["path"] == str(out) and out.is_file()
    assert "leangen: error: cannot use the ledger" in captured.err


@pytest.mark.parametrize("name, code", [("SIGTERM", 143), ("SIGHUP", 129)])
def test_signals_that_end_a_program_let_it_tidy_up(monkeypatch, name, code):
    number = getattr(signal, name, None)
    if number is None or signal.getsignal(number) is not signal.SIG_DFL:
        pytest.skip(f"{name} is not there, or somebody else's")
    tidied = []

    def work(self, *args, **options):
        try:
            signal.raise_signal(number)
        finally:
            tidied.append(name)

    monkeypatch.setattr("leangen.store.Store.__init__", work)
    with pytest.raises(SystemExit) as stop:
        main(["du"])
    assert (stop.value.code, tidied) == (code, [name])
    assert signal.getsignal(number) is signal.SIG_DFL


def test_ctrl_c_at_the_very_start_is_no_traceback(capsys, monkeypatch):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("leangen.cli._parser", interrupted)
    assert main(["du"]) == 130
    assert "interrupted" in capsys.readouterr().err


def test_input_that_is_not_utf8_can_be_read(monkeypatch, capsys):
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xffa"), encoding="utf-8"))
    assert main(["du"]) == 0
    assert sys.stdin.read() == "\ufffda"


def test_a_table_loses_nothing_on_a_narrow_terminal(monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setenv("COLUMNS", "10")
    monkeypatch.setattr(sys, "stdout", out := Terminal())
    table(["model", "runs", "energy"], [["galaxy-flow:fp32", "12", "0.0152 ± 0.0091 J"]])
    words = re.sub(r"\x1b\[[0-9;]*m", "", out.getvalue()).split()
    assert {"12", "0.0152", "0.0091", "energy"} <= set(words)


def test_a_path_stands_on_a_line_of_its_own_after_streamed_text(capsys, monkeypatch, tmp_path):
    class Stream(list):
        result = Result(Output(array=np.zeros((2, 1)), media="table"), receipt("a"))

    steps = Stream([Step(kind="decode", units=1, text="Hello.")])
    engine = SimpleNamespace(name="talk", media="table", stream=lambda *_, **__: steps)
    monkeypatch.setattr("leangen.load", lambda *_, **__: engine, raising=False)
    assert main(["generate", "talk", "-o", str(tmp_path / "a.csv")]) == 0
    assert capsys.readouterr().out.splitlines() == ["Hello.", str(tmp_path / "a.csv")]
