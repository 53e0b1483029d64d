"""The operators for a card and a stand-in for its driver, compiled for machines without one."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = Path(__file__).parent
NATIVE = TESTS.parent / "kernels" / "native"


def build(folder: Path) -> Path:
    """The operators' library, for the CPU provider, with `libcuda.so.1` beside it.

    Its kernels for the CPU are but names. Skips the test where there is no compiler.
    """
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None or sys.platform != "linux":
        pytest.skip("no C compiler for the operators")
    table = folder / "table.inc"
    table.write_text(
        "static void nothing(void) {}\n"
        'static const struct entry entries[] = {{"portable", "nothing", nothing}};\n'
    )
    built = folder / "operators.so"
    common = [compiler, "-std=c11", "-O0", "-shared", "-fPIC", "-pthread", "-Wall", "-Werror"]
    subprocess.run(
        [*common, f'-DTABLE="{table}"', "-DCUDA_PROVIDER=NULL", *NATIVE.glob("*.c"),
         "-lm", "-ldl", "-o", built], check=True,
    )  # fmt: skip
    subprocess.run(
        [*common[:5], TESTS / "fake_cuda.c", "-Wl,-soname,libcuda.so.1",
         "-o", folder / "libcuda.so.1"], check=True,
    )  # fmt: skip
    return built
