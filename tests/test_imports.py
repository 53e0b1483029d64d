"""What each command may load: a ledger needs no ONNX Runtime, a warm start needs no onnx."""

import os
import subprocess
import sys

import pytest
from gguf_fixtures import Tiny, write

from leangen.exporters import gguf

LIGHT = {"onnxruntime", "onnx", "torch", "numba", "numpy", "rich", "jinja2", "huggingface_hub"}
RUN_ONLY = {"onnx", "torch", "numba", "gguf", "transformers", "huggingface_hub"}
UNASKED = {"difflib", "jinja2", "statistics", "subprocess", "tarfile", "tomllib"}
UNASKED |= {"importlib.metadata", "leangen.pipeline.running", "numpy.random", "wave", "zipfile"}


def loaded(code):
    """The modules, and their packages, that a fresh interpreter has after `code`."""
    script = f"import sys\n{code}\nprint()\nprint(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split("\n")[-2].split())


PARSER = "import leangen.cli; leangen.cli._parser()"


@pytest.mark.parametrize(
    "code",
    [
        "import leangen",
        "import leangen.records, leangen.ledger",
        PARSER,
    ],
)
def test_reading_an_account_loads_nothing_heavy(code):
    assert not loaded(code) & LIGHT


def test_help_waits_for_no_dataclass():
    assert not loaded(PARSER) & {"dataclasses", "leangen.charts", "leangen.records"}


def test_running_loads_no_export_dependency():
    assert not loaded("import leangen.api, leangen.engine, leangen.families") & RUN_ONLY


def test_a_first_token_waits_for_nothing_that_it_does_not_need(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANGEN_HOME", str(tmp_path))
    gguf.export(write(tmp_path / "tiny.gguf", Tiny()), tmp_path / "bundle")
    code = (
        "import leangen as lg\n"
        f"m = lg.load({str(tmp_path / 'bundle')!r}, baseline_s=0)\n"
        "m.generate('a', max_new_tokens=1)"
    )
    loaded(code)  # the first time its graph is lowered
    assert not loaded(code) & (RUN_ONLY | UNASKED)


def test_the_public_names_are_there():
    import leangen as lg

    for name in lg.__all__:
        assert getattr(lg, name).__module__.startswith("leangen.")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lg.lode  # noqa: B018


QUIET = """
import time, leangen.api
time.sleep(0.05)
before = time.process_time()
time.sleep(0.1)
print(time.process_time() - before < 0.05)
"""


def test_importing_leaves_no_thread_spinning_and_nobody_is_told(tmp_path):
    env = {**os.environ, "HOME": str(tmp_path), "XDG_CACHE_HOME": str(tmp_path / "cache")}
    for name in ("CI", "ORT_RUNNING_UNIT_TESTS", "ORT_DISABLE_TELEMETRY"):
        env.pop(name, None)
    for library in ("OPENBLAS", "MKL", "OMP"):  # theirs are among those that could spin
        env.pop(f"{library}_NUM_THREADS", None)
    done = subprocess.run(
        [sys.executable, "-c", QUIET], env=env, capture_output=True, text=True, check=True
    )
    assert done.stdout == "True\n"
    assert list(tmp_path.iterdir()) == []  # ONNX Runtime's usage data would be kept there


def test_your_own_settings_of_libraries_stay(monkeypatch):
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    code = "import os, leangen; print(os.environ['ORT_DISABLE_TELEMETRY'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "0\n"


@pytest.mark.parametrize("given", ["", "gc.disable()", "gc.freeze()"])
def test_importing_leaves_garbage_collection_as_it_was(given):
    code = f"""
import gc, leangen
{given}
before = gc.isenabled(), gc.get_freeze_count() > 0
leangen.load
assert (gc.isenabled(), gc.get_freeze_count() > 0) == before
"""
    subprocess.run([sys.executable, "-c", code], check=True)
