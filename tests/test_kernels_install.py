"""Installing: where the kernels can be built a library comes out, elsewhere the reason."""

import _ctypes
import importlib.util
import os
import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from leangen_kernels import toolchain, variants

ROOT = Path(__file__).resolve().parents[1]
STATUS = "import leangen_kernels; print(*leangen_kernels.status())"
BUILD = {**os.environ, "LEANGEN_BUILD_KERNELS": "", "LEANGEN_KERNELS": ""}


@pytest.fixture
def linux(monkeypatch):
    """A machine that has all it takes, whatever this one is."""
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(platform, "libc_ver", lambda: ("glibc", "2.36"))
    monkeypatch.setattr(toolchain, "NUMBA_BELOW", (sys.version_info[0] + 1, 0))
    monkeypatch.setattr(toolchain.shutil, "which", lambda name: f"/usr/bin/{name}")
    monkeypatch.setattr(toolchain.importlib.util, "find_spec", lambda name: None)
    monkeypatch.delenv("CC", raising=False)
    monkeypatch.delenv("LEANGEN_BUILD_KERNELS", raising=False)
    return monkeypatch


@pytest.fixture
def asked_for():
    """What the build backend has pip fetch for a wheel and for an editable installation."""
    spec = importlib.util.spec_from_file_location("backend", ROOT / "kernels" / "build_backend.py")
    backend = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(backend)

    def ask():
        wheel = backend.get_requires_for_build_wheel()
        assert backend.get_requires_for_build_editable() == wheel
        return {need.split(">")[0] for need in wheel} & {"numba", "numpy"}

    return ask


def test_numba_is_fetched_where_the_kernels_can_be_built(linux, asked_for):
    assert toolchain.why_not() is None
    assert asked_for() == {"numba", "numpy"}
    linux.setenv("LEANGEN_BUILD_KERNELS", "0")
    assert asked_for() == set()


@pytest.mark.parametrize("machine", sorted({variant.machine for variant in variants.VARIANTS}))
def test_every_machine_of_a_variant_is_built_for(linux, machine):
    assert toolchain.why_not(machine) is None


PLACES = {
    "macOS on arm64": ("darwin", ("", ""), "arm64"),
    "Windows on AMD64": ("win32", ("", ""), "AMD64"),
    "Linux without glibc on x86_64": ("linux", ("", ""), "x86_64"),
    "Linux on riscv64": ("linux", ("glibc", "2.39"), "riscv64"),
}


@pytest.mark.parametrize("place", PLACES)
def test_elsewhere_the_reason_is_plain_and_nothing_is_fetched(linux, asked_for, place):
    system, libc, machine = PLACES[place]
    linux.setattr(sys, "platform", system)
    linux.setattr(platform, "libc_ver", lambda: libc)
    linux.setattr(platform, "machine", lambda: machine)
    assert toolchain.why_not().endswith(f"and this is {place}")
    assert asked_for() == set()


def test_without_a_numba_wheel_nothing_is_fetched(linux, asked_for):
    linux.setattr(toolchain, "NUMBA_BELOW", sys.version_info[:2])
    assert "has no wheel for this Python" in toolchain.why_not()
    assert asked_for() == set()
    linux.setattr(toolchain.importlib.util, "find_spec", lambda name: name)
    assert toolchain.why_not() is None, "a Numba that is installed will do"


def test_the_first_compiler_there_is_taken(linux, asked_for):
    assert toolchain.compiler_command() == ["cc"]
    linux.setenv("CC", "ccache gcc -m64")
    assert toolchain.compiler_command() == ["ccache", "gcc", "-m64"]
    linux.delenv("CC")
    linux.setattr(toolchain.shutil, "which", lambda name: name if name == "clang" else None)
    assert toolchain.compiler_command() == ["clang"]
    linux.setattr(toolchain.shutil, "which", lambda name: None)
    wanted = "no C compiler: cc, gcc and clang are not on the PATH; install gcc, then leangen again"
    assert toolchain.why_not() == wanted
    assert asked_for() == set()


def test_without_a_compiler_the_reason_is_left(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT, env={**BUILD, "PATH": "", "CC": "no-such-compiler"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "leangen_kernels"
    assert [path.name for path in folder.iterdir()] == ["libleangen_kernels.txt"]
    note = (folder / "libleangen_kernels.txt").read_text()
    assert note.startswith("no C compiler: no-such-compiler is not on the PATH")
    source = ROOT / "kernels" / "leangen_kernels" / "__init__.py"
    (folder / "__init__.py").write_text(source.read_text())
    assert status(tmp_path) == f"None no kernel library: {note}"


def test_kernels_for_cards_that_were_asked_for_are_there_or_the_build_fails(tmp_path):
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(tmp_path)],
        cwd=ROOT, env={**BUILD, "PATH": "", "CC": "no-such-compiler", "LEANGEN_BUILD_CUDA": "1"},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 1
    assert "LEANGEN_BUILD_CUDA=1: no C compiler: no-such-compiler is not on" in done.stderr


def test_a_library_that_was_never_built_is_told_from_one_that_failed(tmp_path):
    (tmp_path / "leangen_kernels").mkdir()
    source = ROOT / "kernels" / "leangen_kernels" / "__init__.py"
    (tmp_path / "leangen_kernels" / "__init__.py").write_text(source.read_text())
    assert "it was not built; `pip install` builds it" in status(tmp_path)
    library = tmp_path / "leangen_kernels" / "libleangen_kernels.so"
    for foreign in (b"no library", Path(_ctypes.__file__).read_bytes()):
        library.write_bytes(foreign)
        assert "None the kernel library does not load: " in status(tmp_path)


def status(folder):
    """What the package installed in `folder` says of itself."""
    said = subprocess.run(
        [sys.executable, "-c", STATUS], cwd=folder, env={**BUILD, "PYTHONPATH": str(folder)},
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    return said.stdout


@pytest.fixture
def sources(tmp_path):
    """What an installation needs, as a clone would have it: nothing is built yet."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / name)
    left_out = shutil.ignore_patterns("__pycache__", "libleangen_kernels.*")
    for name in ("leangen", "kernels"):
        shutil.copytree(ROOT / name, folder / name, ignore=left_out)
    return folder


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment, and a PATH on which there is nothing but it."""
    folder = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder


def install(environment, sources, *options, **variables):
    command = [str(environment / "bin" / "pip"), "install", "--no-deps", *options]
    path = str(environment / "bin")
    done = subprocess.run(
        [*command, str(sources)], env={**BUILD, "PATH": path, **variables},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    code = "import leangen_kernels as k; print(*k.status())"
    python = str(environment / "bin" / "python")
    return subprocess.run(
        [python, "-c", code], env=BUILD, cwd=environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.slow
@pytest.mark.parametrize("options", [(), ("-e",)], ids=["installed", "editable"])
def test_pip_installs_without_a_compiler(environment, sources, options):
    said = install(environment, sources, *options)
    assert "no C compiler: cc, gcc and clang are not on the PATH" in said


@pytest.mark.slow
def test_pip_installs_where_numba_has_no_wheel(environment, sources):
    file = sources / "kernels" / "leangen_kernels" / "toolchain.py"
    text = file.read_text()
    assert "NUMBA_BELOW = (3, 15)" in text
    file.write_text(text.replace("NUMBA_BELOW = (3, 15)", "NUMBA_BELOW = (3, 0)"))
    said = install(environment, sources, PATH=os.environ["PATH"])
    assert "Numba, which compiles the kernels, has no wheel for this Python" in said


@pytest.mark.slow
def test_pip_installs_where_numba_is_missing(environment, sources):
    """Without build isolation nothing is fetched: the environment has what it has."""
    pip = str(environment / "bin" / "pip")
    subprocess.run([pip, "install", "-q", "setuptools>=77"], check=True)
    said = install(environment, sources, "--no-build-isolation", PATH=os.environ["PATH"])
    assert "Numba cannot be imported where leangen is built" in said


@pytest.mark.slow
def test_kernels_may_be_left_out(environment, sources):
    said = install(environment, sources, PATH=os.environ["PATH"], LEANGEN_BUILD_KERNELS="0")
    assert "it was not built" in said


@pytest.mark.slow
def test_a_wheel_with_the_kernels_for_cards(tmp_path):
    """From pip's own build environment, which NVIDIA's loader of libraries does not know of."""
    if (reason := toolchain.why_not()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=ROOT, check=True, env={**BUILD, "LEANGEN_BUILD_CUDA": "1"})
    (wheel,) = tmp_path.glob("*.whl")
    with zipfile.ZipFile(wheel) as archive:
        listed = archive.read("leangen_kernels/cuda/leangen_cuda.txt").decode().splitlines()
        ptx = archive.read("leangen_kernels/cuda/leangen_cuda.sm_80.ptx").decode()
    assert ptx.count(".visible .entry leangen_") == len(listed) > 30


@pytest.mark.slow
def test_the_wheel_fits_every_python_of_the_platform(tmp_path):
    if (reason := toolchain.why_not()) is not None:
        pytest.skip(reason)
    command = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), "."]
    subprocess.run(command, cwd=ROOT, check=True, env=BUILD)
    (wheel,) = tmp_path.glob("*.whl")
    assert f"-py3-none-linux_{platform.machine()}" in wheel.name
    with zipfile.ZipFile(wheel) as archive:
        assert "leangen_kernels/libleangen_kernels.so" in archive.namelist()
    target = tmp_path / "installed"
    install = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(target)]
    subprocess.run([*install, str(wheel)], check=True)
    assert not status(target).startswith("None")
