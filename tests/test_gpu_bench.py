"""bench/gpu.py and the driver's bindings, on a stand-in for the driver that only notes launches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench_scripts
import pytest

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
sys.path.insert(0, str(BENCH))  # its modules import one another

gpu = bench_scripts.load("gpu")
PATHS = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in sys.path)}


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with a libcuda.so.1 and kernels that are but names."""
    compiler = next((c for c in ("cc", "gcc", "clang") if shutil.which(c)), None)
    if compiler is None:
        pytest.skip("no C compiler for the stand-in")
    folder = tmp_path_factory.mktemp("driver")
    built = [compiler, "-shared", "-fPIC", TESTS / "fake_cuda.c", "-o", folder / "libcuda.so.1"]
    subprocess.run(built, check=True)
    kernels = folder / "kernels"
    kernels.mkdir()
    names = ["rows_a8 iiiiiiiiif 1024", "rows_a16 iiiiiiiiif 1024", "merge_64 iiiiii 64",
             "append_fp16_64 iiiiiiiiiiiiiff 32", "attend_fp16_64 iiiiiiiiii 128"]  # fmt: skip
    for shape in ("1x1", "2x2", "2x4"):
        names += [f"linear_q4_{kind}_{shape} iiiiiiiiiiiiiii 256" for kind in ("a8", "a16")]
    (kernels / "leangen_cuda.txt").write_text("".join(f"{name}\n" for name in names))
    (kernels / "leangen_cuda.ptx").write_text("// nothing\n")
    return folder


def run_fake(fake, code, **settings):
    """Python in a process that finds the stand-in as the driver."""
    environment = {
        **os.environ, "LD_LIBRARY_PATH": str(fake), "FAKE_CUDA_LOG": str(fake / "log"),
        "FAKE_CUDA_NAMES": str(fake / "kernels" / "leangen_cuda.txt"),
        "KERNELS": str(fake / "kernels"), **PATHS, **settings,
    }  # fmt: skip
    (fake / "log").write_text("")
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )
    return done, (fake / "log").read_text().splitlines()


OPEN = """
import os, pathlib
from leangen_kernels.cuda import driver
card = driver.Card(0, pathlib.Path(os.environ["KERNELS"]))
"""


def test_a_launch_reaches_the_driver_with_its_arguments(fake):
    code = OPEN + (
        "print(card.device.name, card.device.capability, card.multiprocessors)\n"
        "card.launch('rows_a8', (3, 1, 1), 64, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5)"
    )
    done, log = run_fake(fake, code)
    assert done.stdout == "Fake H100 (9, 0) 132\n", done.stderr
    assert log == ["rows_a8 3 1 1 64 1 1 2 3 4 5 6 7 8 9 0.5"]


def test_a_full_card_and_a_missing_one_are_told_apart(fake):
    done, _ = run_fake(fake, OPEN + "card.empty(2000, 'u1')", FAKE_CUDA_BYTES="1000")
    assert "OutOfMemoryError: cuMemAlloc_v2: out of memory (2)" in done.stderr
    done, _ = run_fake(fake, OPEN, FAKE_CUDA_COUNT="0")
    assert "CudaError: device 0 of 0: there is no such card" in done.stderr
    done, _ = run_fake(fake, OPEN, LD_LIBRARY_PATH="")
    assert "no NVIDIA driver" in done.stderr or shutil.which("nvidia-smi")


def test_a_decoding_step_is_every_product_of_every_layer(fake):
    code = (
        OPEN
        + """
import gpu_rows, gpu_models
driver.Card = lambda index: card
bench = gpu_rows.Bench(0, 0.05)
shape = gpu_models.Shape(2, 64, 128, 2, 1, 64, 256)
print(gpu_models._step(bench, shape, "int4 a8", 3))
"""
    )
    done, log = run_fake(fake, code)
    assert done.returncode == 0, done.stderr
    names = [line.split()[0] for line in log if line != "graph"]
    layer = ["rows_a8", "linear_q4_a8_1x1", "append_fp16_64", "attend_fp16_64", "merge_64",
             "rows_a8", "linear_q4_a8_1x1", "rows_a8", "linear_q4_a8_2x2", "rows_a8",
             "linear_q4_a8_1x1"]  # fmt: skip
    assert names == [*layer, *layer, "rows_a8", "linear_q4_a8_1x1"]
    assert "graph" in log


def test_without_a_card_the_script_says_so(tmp_path):
    if shutil.which("nvidia-smi"):
        pytest.skip("there is a card")
    command = [sys.executable, BENCH / "gpu.py", "--json", tmp_path / "out.json"]
    done = subprocess.run(
        command, env={**os.environ, **PATHS}, capture_output=True, text=True, cwd=tmp_path
    )
    assert (done.returncode, done.stdout[:8]) == (0, "no card:")
    assert json.loads((tmp_path / "out.json").read_text())["card"] is None
    assert not (tmp_path / "gpu.json").exists()


class Clock:
    """Time that passes by a second each time it is read."""

    def __init__(self):
        self.now = 0.0

    def __call__(self):
        self.now += 1
        return self.now


def rows(ran, *names, fails=()):
    def run(name):
        ran.append(name)
        if name in fails:
            raise ValueError(f"{name} is bad")
        return {"time_s": 1e-3, "bytes": 2e9}

    return [gpu.Row(name, lambda name=name: run(name)) for name in names]


def test_a_run_goes_on_where_it_was(tmp_path):
    card, ran = {"name": "X"}, []
    state = gpu.State(tmp_path / "s.json", card)
    assert gpu.run_part("peers", rows(ran, "a", "b", "c"), state, until=3, clock=Clock()) == 1
    assert ran == ["a", "b"]
    state = gpu.State(tmp_path / "s.json", card)
    assert gpu.run_part("peers", rows(ran, "a", "b", "c"), state, until=9, clock=Clock()) == 0
    assert ran == ["a", "b", "c"]
    assert not gpu.State(tmp_path / "s.json", {"name": "Y"}).rows("peers")


def test_a_row_that_fails_is_told_and_one_that_kills_is_left_out(tmp_path):
    ran = []
    state = gpu.State(tmp_path / "s.json", {})
    given = rows(ran, "a", "b", fails=["a"])
    assert gpu.run_part("models", given, state, until=99, clock=Clock()) == 1
    assert ran == ["a", "b"]
    assert state.rows("models")["a"] == {"error": "ValueError: a is bad"}
    lost = gpu.run_part("energy", given, state, until=99, clock=Clock(), alive=lambda: False)
    assert lost == gpu.CRASHED and "b" not in state.rows("energy")
    state.put("energy", "b", {"started": 1})  # as a process leaves it that died once
    gpu.run_part("energy", given, state, until=99, clock=Clock())
    assert ran == ["a", "b", "a", "b"]
    state.put("energy", "b", {"started": 2})
    gpu.run_part("energy", given, state, until=99, clock=Clock())
    assert ran == ["a", "b", "a", "b"]


def test_the_table_shows_rates_against_what_the_card_reached():
    measured = {
        "kernels": {
            "ceilings": {"time_s": 1e-3, "copy_bytes_s": 3e12, "matrix_flop_s": 8e14},
            "linear": {"time_s": 1e-5, "bytes": 2.4e7, "flop": 8e8},
            "many": {"time_s": 1e-3, "bytes": 3e7, "flop": 4e11},
        },
        "peers": {"x": {"absent": "no torch"}, "y": {"error": "E: e"}, "z": {"started": 2}},
        "energy": {"t": {"joules": 0.5, "u_joules": 0.05, "unit": "J/token", "note": "gross"}},
    }
    lines = list(gpu.table({"rows": measured}))
    assert lines[2].split() == ["kernels", "linear", "10.0", "us", "2400", "80.0", "80%"]
    assert lines[3].split()[-2:] == ["400.0", "50%"]
    assert [line.split(maxsplit=2)[2] for line in lines[4:7]] == [
        "no torch", "E: e", "did not come to an end",
    ]  # fmt: skip
    assert lines[7].endswith("0.5 ± 0.05 J/token gross")
