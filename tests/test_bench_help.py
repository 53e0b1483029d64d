"""Every script of bench/ says what it does, with an example, as its docstring has it."""

import ast
import subprocess
import sys

import pytest
from bench_scripts import BENCH

SCRIPTS = [path for path in sorted(BENCH.glob("*.py")) if "__main__" in path.read_text("utf-8")]


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_has_an_example_that_its_help_keeps_whole(path):
    text = path.read_text("utf-8")
    said = ast.get_docstring(ast.parse(text), clean=False).splitlines()
    assert any(line.startswith(f"    python bench/{path.name}") for line in said)
    assert "description=__doc__" in text
    assert "formatter_class=argparse.RawDescriptionHelpFormatter" in text


def test_help_shows_the_example():
    shown = subprocess.run(
        [sys.executable, str(BENCH / "overhead.py"), "--help"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "\n    python bench/overhead.py --json\n" in shown.stdout
