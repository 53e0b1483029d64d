"""A stand-in for a card's driver, and the operators for a card, built for machines without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NATIVE = TESTS.parent / "kernels" / "native"


def _compile(*arguments: object) -> None:
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for the stand-in")
    common = ["-std=c11", "-O0", "-shared", "-fPIC", "-pthread"]
    subprocess.run([compiler, *common, *map(str, arguments)], check=True)


def driver(folder: Path) -> None:
    """Its `libcuda.so.1`: see `fake_cuda.c`."""
    library = folder / "libcuda.so.1"
    _compile(TESTS / "fake_cuda.c", "-Wl,-soname,libcuda.so.1", "-o", library)


def operators(folder: Path) -> Path:
    """The operators' library, for the CPU provider; its kernels for the CPU are but names."""
    table = folder / "table.inc"
    table.write_text(
        "static void nothing(void) {}\n"
        'static const struct entry entries[] = {{"portable", "nothing", nothing}};\n'
    )
    built = folder / "operators.so"
    _compile(
        "-Wall", "-Werror", f'-DTABLE="{table}"', "-DCUDA_PROVIDER=NULL", *NATIVE.glob("*.c"),
        "-lm", "-ldl", "-o", built,
    )  # fmt: skip
    return built


def names_only(folder: Path) -> None:
    """What a build of the kernels for a card leaves, without the kernels."""
    pytest.importorskip("numba")
    from leangen_kernels.cuda import build

    folder.mkdir()
    for capability in build.OLDEST_PTX:
        (folder / build.PTX.format(capability)).write_text("// nothing\n")
    lines = [f"{n} {kernel.letters} {kernel.threads}\n" for n, kernel in build.kernels().items()]
    (folder / build.NAMES).write_text("".join(lines))
