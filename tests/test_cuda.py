"""GPU kernels without a GPU: against their twins in Numba's simulator, and as PTX."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import draws
import numpy as np
import pytest
from cuda_cases import CASES
from leangen_kernels import layout
from leangen_kernels.cuda import launches, tiles

TESTS = Path(__file__).parent


@pytest.fixture(scope="module")
def simulated():
    """What each case says in the simulator, which a process chooses before it imports Numba."""
    for name in ("numba", "greenlet"):
        if importlib.util.find_spec(name) is None:
            pytest.skip(f"{name}, with which the simulator runs the kernels, is not installed")
    done = subprocess.run(
        [sys.executable, TESTS / "cuda_simulated.py"],
        env={**os.environ, "NUMBA_ENABLE_CUDASIM": "1"},
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode in (0, 1), done.stderr
    return dict(line.split(": ", 1) for line in done.stdout.splitlines())


@pytest.mark.parametrize("case", CASES)
def test_every_kernel_is_its_twin(simulated, case):
    assert simulated[case].startswith("ok ")


@pytest.mark.parametrize("check", ["races show", "absent lanes show", "all kernels ran"])
def test_the_simulator_can_tell(simulated, check):
    assert simulated[check] == "ok"


@pytest.mark.parametrize("form", [f for f in layout.FORMS.values() if tiles.holds(f)])
@pytest.mark.parametrize(("n", "k"), [(1, 1), (16, 128), (33, 300)])
def test_tiles_give_back_what_was_packed(form, n, k):
    rng = draws.rng()
    codes = rng.integers(0, 1 << form.bits, (n, k), dtype=np.uint8)
    numbers = rng.random((2, n, -(-k // 32))).astype(np.float16).astype(np.float32)
    given = (codes, numbers[0], numbers[1] if form.minimum else None)
    packed = tiles.pack(form, *given)
    assert packed.size == tiles.packed_bytes(form, n, k)
    for found, wanted in zip(tiles.unpack(form, packed, n, k), given, strict=True):
        np.testing.assert_array_equal(found, wanted)


def test_a_form_without_a_place_is_refused():
    form = layout.FORMS["q4_g16"]
    assert not tiles.holds(form)
    with pytest.raises(ValueError, match="form q4_g16 has no layout on a GPU"):
        tiles.pack(form, np.zeros((1, 16), np.uint8), np.ones((1, 1), np.float32))


@pytest.mark.parametrize("tokens", [1, 8, 9, 16, 17, 300])
@pytest.mark.parametrize(("n", "k"), [(16, 128), (576, 576), (14336, 4096), (128256, 2048)])
def test_the_warps_of_a_product_cover_all_rows_and_tokens_once(tokens, n, k):
    op = launches.Linear(layout.FORMS["q4"], n, k)
    at = {"x": 0, "weights": 0, "y": 0, "scratch": 0}
    ready, product = op.launches(tokens, at, 132)
    row_tiles, eights, warps = launches.shape(tokens, gated=False)
    shift = product.arguments[11]
    assert ready.grid == (tokens, 1, 1)
    assert product.threads == 32 * warps <= 256 and 1 << shift <= warps
    rows, of_tokens = row_tiles * 16 << shift, eights * 8
    assert 0 <= product.grid[0] * rows - n < rows
    assert 0 <= product.grid[1] * of_tokens - tokens < of_tokens


def test_nothing_here_needs_numba():
    code = (
        "import sys, leangen_kernels, leangen_kernels.cuda.tiles, leangen_kernels.cuda.launches\n"
        "print('numba' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False\n"


@pytest.mark.slow
def test_kernels_compile_without_spills(tmp_path):
    """All of them, for three generations of cards: minutes where none is cached."""
    pytest.importorskip("numba")
    from leangen_kernels.cuda import build

    if reason := build.why_not():
        pytest.skip(reason)
    files = build.build(tmp_path, TESTS.parent / "build" / "kernels")
    listed = (tmp_path / build.NAMES).read_text().split("\n")[:-1]
    entries = re.findall(r"\.visible \.entry leangen_(\w+)\(", files[0].read_text())
    assert [line.split()[0] for line in listed] == entries
    if shutil.which("ptxas") is None:
        pytest.skip("no ptxas on the PATH, which counts registers")
    for architecture in build.ARCHITECTURES:
        text = files[0 if architecture < 90 else 1]
        report = build.assemble(text, architecture, tmp_path / "out.cubin")
        spilled = [name for name in build.spills(report) if not name.endswith("_2x4")]
        assert not spilled, architecture  # 2x4, for many tokens, is short of registers on sm_80
