"""`leangen doctor`: every finding in plain words, what is broken told with its remedy."""

import json
import os

import boards_at
import leangen_kernels
import pytest
from leangen_kernels import build
from ledger_fakes import receipt

from leangen import doctor
from leangen.cli import main
from leangen.ledger import Ledger
from leangen.store import Store

NO_COMPILER = "no kernel library: no C compiler: cc is not on the PATH; install gcc, then leangen"


def by_name(findings):
    """The findings of a check by what was looked at, the last of each."""
    return {finding.what: finding for finding in findings}


def test_all_is_told_and_a_problem_makes_the_exit_code(capsys, monkeypatch, home):
    main(["doctor", "--json"])
    told = json.loads(capsys.readouterr().out)
    wanted = {"python", "system", "cpu", "threads", "memory", "onnxruntime", "kernels", "energy"}
    assert {finding["what"] for finding in told["findings"]} >= wanted | {"store", "ledger"}
    assert not home.exists(), "nothing is made"
    for status, code in (("note", 0), ("problem", 1)):
        found = doctor.Finding("kernels", status, "there are none", "install gcc")
        monkeypatch.setattr(doctor, "examine", lambda found=found: [found])
        assert main(["doctor"]) == code
        line, remedy = capsys.readouterr().out.splitlines()
        assert line.split() == [status, "kernels", "there", "are", "none"]
        assert remedy.strip() == "remedy: install gcc"


@pytest.mark.parametrize(
    ("why", "status", "remedy"),
    [
        (NO_COMPILER, "problem", "install gcc, then leangen"),
        ("switched off by LEANGEN_KERNELS=off", "note", None),
        ("no kernel library: the kernels are for Linux, and this is macOS on arm64", "note", None),
    ],
)
def test_why_there_are_no_kernels(monkeypatch, why, status, remedy):
    monkeypatch.setattr(leangen_kernels, "status", lambda: (None, why))
    found = by_name(doctor.kernels())["kernels"]
    assert (found.status, found.remedy) == (status, remedy)
    assert found.detail == why.split("; ")[0] + ": ONNX Runtime's own run everything"


def test_kernels_that_compute_something_else_are_a_problem(monkeypatch):
    from leangen_kernels import selftest

    monkeypatch.setattr(leangen_kernels, "status", lambda: ("avx2", "the fastest"))
    monkeypatch.setattr(doctor, "_newer_sources", lambda package: None)
    monkeypatch.setattr(selftest, "results_apart", lambda: {"Linear": "differs", "Conv": None})
    found = by_name(doctor.kernels())["self-test"]
    assert (found.status, found.detail) == ("problem", "Linear: differs")
    assert "LEANGEN_KERNELS=portable" in found.remedy
    monkeypatch.setattr(selftest, "results_apart", lambda: {"Linear": None, "Conv": None})
    assert by_name(doctor.kernels())["self-test"].detail == "Linear, Conv agree with NumPy"


def test_a_library_older_than_its_sources_is_found(tmp_path):
    package, native = tmp_path / "leangen_kernels", tmp_path / "native"
    package.mkdir()
    for name in (*(f"{name}.py" for name in build.SOURCES), build.LIBRARY):
        (package / name).touch()
    assert doctor._newer_sources(package) is None, "an installed package has no C sources"
    native.mkdir()
    source = native / "bridge.c"
    source.touch()
    os.utime(source, (1, 1))
    os.utime(package / build.LIBRARY, (2**31, 2**31))
    assert doctor._newer_sources(package) is None
    os.utime(source, (2**31 + 1, 2**31 + 1))
    assert doctor._newer_sources(package) == "bridge.c"


def test_a_changed_ledger_is_found_and_left(home):
    path = Store().ledger_path
    assert by_name(doctor.ledger(path))["ledger"].status == "ok"
    assert not path.exists()
    with Ledger(path) as book:
        book.append(receipt(1)).wait()
    assert by_name(doctor.ledger(path))["ledger"].detail.startswith(f"{path}: 1 rows as they were")
    with Ledger(path) as book, book._use() as db:
        db.execute("UPDATE entries SET document = replace(document, 'smollm2', 'gpt-99')")
    found = by_name(doctor.ledger(path))["ledger"]
    assert found.status == "problem" and "row 1 was changed" in found.detail
    path.write_bytes(b"not a database at all")
    found = by_name(doctor.ledger(path))["ledger"]
    assert found.status == "problem" and "it is no SQLite file" in found.detail
    assert path.read_bytes() == b"not a database at all"


def test_a_store_that_cannot_be_written_or_is_full(monkeypatch, tmp_path, home):
    assert by_name(doctor.storage(Store()))["store"].status == "ok"

    def refuse(**_):
        raise PermissionError(13, "Permission denied")

    with monkeypatch.context() as patch:
        patch.setattr(doctor.tempfile, "TemporaryFile", refuse)
        found = by_name(doctor.storage(Store()))["store"]
        assert found.detail == f"{home} cannot be written: Permission denied"
        assert "LEANGEN_HOME" in found.remedy
    monkeypatch.setattr(doctor, "LEAST_FREE_BYTES", 10**18)
    assert by_name(doctor.storage(Store()))["store"].status == "problem"


@pytest.mark.parametrize("available_kb", [100_000, 8_000_000])
def test_little_memory_is_a_problem(tmp_path, available_kb):
    (tmp_path / "proc").mkdir()
    text = f"MemTotal:  16000000 kB\nMemFree: 5 kB\nMemAvailable:  {available_kb} kB\n"
    (tmp_path / "proc" / "meminfo").write_text(text)
    found = by_name(doctor.memory(tmp_path))["memory"]
    assert found.status == ("problem" if available_kb < 500_000 else "ok")
    assert by_name(doctor.memory(tmp_path / "none"))["memory"].status == "note"


def test_a_board_is_described_by_its_own_files():
    root = boards_at.BOARDS / "amd-desktop"
    found = by_name(doctor.processor(root))
    assert found["cpu"].detail.startswith("AMD Ryzen")
    assert int(found["threads"].detail.split(":")[0]) >= 1


def test_what_disturbs_a_measurement_has_a_remedy(tmp_path):
    cpu = tmp_path / "sys/devices/system/cpu"
    (cpu / "cpu0/cpufreq").mkdir(parents=True)
    (cpu / "cpufreq").mkdir()
    (cpu / "cpu0/cpufreq/scaling_governor").write_text("powersave\n")
    (cpu / "cpufreq/boost").write_text("1\n")
    found = list(doctor.measuring(tmp_path))
    remedies = [finding.remedy for finding in found]
    assert remedies[0].startswith("sudo cpupower") and "boost" in remedies[1]
    assert found[2].detail.startswith("this machine does not tell") and remedies[2] is None


def test_sensors_that_cannot_be_read_come_with_their_remedy():
    found = list(doctor.energy(boards_at.BOARDS / "denied"))
    assert found[0].status == "note" and "estimate" in found[0].detail
    assert any("rapl" in finding.detail and finding.remedy for finding in found[1:])


def test_an_extra_that_is_missing_is_told_with_its_command(monkeypatch):
    needs = ["numpy>=1", "gruut>=2 ; extra == 'speech'", 'no-such-thing; extra == "hub"']
    monkeypatch.setattr(doctor.metadata, "requires", lambda name: [*needs, "x; extra == 'dev'"])
    monkeypatch.setattr(doctor, "_version", lambda name: None if name == "no-such-thing" else "1.0")
    speech, hub = doctor.extras()
    assert (speech.status, hub.status) == ("ok", "note")
    assert hub.detail == "hub: no-such-thing not installed"
    assert hub.remedy == "pip install 'leangen[hub]'"


def test_two_onnxruntimes_are_noted(monkeypatch):
    monkeypatch.setattr(doctor, "_version", lambda name: "1.31.1")
    found = by_name(doctor.runtime())["onnxruntime"]
    assert found.status == "note" and "pip uninstall onnxruntime onnxruntime-gpu" in found.remedy


def test_an_onnxruntime_that_does_not_load_is_a_problem(monkeypatch):
    def refuse(name):
        raise ImportError("libcuda.so.1: cannot open shared object file")

    monkeypatch.setattr(doctor.importlib, "import_module", refuse)
    found = by_name(doctor.runtime())["onnxruntime"]
    assert found.status == "problem" and "libcuda.so.1" in found.detail and found.remedy
