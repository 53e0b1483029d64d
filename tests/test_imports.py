"""What each command may load: a ledger needs no ONNX Runtime, a warm start needs no onnx."""

import subprocess
import sys

import pytest

LIGHT = {"onnxruntime", "onnx", "torch", "numba", "numpy", "rich", "jinja2", "huggingface_hub"}
RUN_ONLY = {"onnx", "torch", "numba", "gguf", "transformers", "huggingface_hub"}


def loaded(code):
    """The top-level modules that a fresh interpreter has after `code`."""
    script = f"import sys\n{code}\nprint(*{{name.split('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    return set(done.stdout.split("\n")[-2].split())


@pytest.mark.parametrize(
    "code",
    [
        "import leangen",
        "import leangen.records, leangen.ledger",
        "import leangen.cli; leangen.cli._parser()",
    ],
)
def test_reading_an_account_loads_nothing_heavy(code):
    assert not loaded(code) & LIGHT


def test_running_loads_no_export_dependency():
    assert not loaded("import leangen.api, leangen.engine, leangen.families") & RUN_ONLY


def test_the_public_names_are_there():
    import leangen as lg

    for name in lg.__all__:
        assert getattr(lg, name).__module__.startswith("leangen.")
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        lg.lode  # noqa: B018
