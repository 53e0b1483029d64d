"""Installing: with a compiler a library comes out, without one a reason."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
STATUS = "import leangen_kernels; print(*leangen_kernels.status())"


def build(tmp_path, **environment):
    """What `setup.py` leaves in a build folder, from a copy of the sources."""
    return subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT,
        env={**os.environ, "LEANGEN_BUILD_KERNELS": "1", **environment},
        capture_output=True,
        text=True,
    )


def test_without_a_compiler_the_reason_is_left(tmp_path):
    done = build(tmp_path, PATH="", CC="no-such-compiler")
    assert done.returncode == 0, done.stderr
    assert not (tmp_path / "leangen_kernels" / "libleangen_kernels.so").exists()
    note = (tmp_path / "leangen_kernels" / "libleangen_kernels.txt").read_text()
    assert note == "no C compiler: no-such-compiler is not on the PATH\n"


def test_the_package_tells_the_reason(tmp_path):
    folder = tmp_path / "leangen_kernels"
    folder.mkdir()
    source = ROOT / "kernels" / "leangen_kernels" / "__init__.py"
    (folder / "__init__.py").write_text(source.read_text())
    (folder / "libleangen_kernels.txt").write_text("no C compiler: cc is not on the PATH\n")
    said = subprocess.run(
        [sys.executable, "-c", STATUS],
        env={**os.environ, "PYTHONPATH": str(tmp_path), "LEANGEN_KERNELS": ""},
        capture_output=True, text=True,
    )  # fmt: skip
    assert said.stdout.startswith("None no kernel library: no C compiler: cc is not on the PATH")


@pytest.mark.slow
def test_the_wheel_fits_every_python_of_the_platform(tmp_path):
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=ROOT, check=True, env={**os.environ, "LEANGEN_BUILD_KERNELS": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    assert "-py3-none-linux_" in wheel.name
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    said = subprocess.run(
        [sys.executable, "-c", STATUS],
        env={**os.environ, "PYTHONPATH": str(target), "LEANGEN_KERNELS": ""},
        capture_output=True, text=True, cwd=tmp_path,
    )  # fmt: skip
    assert said.stdout.endswith("the fastest variant that this CPU runs\n"), said
