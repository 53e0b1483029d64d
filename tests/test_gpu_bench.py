"""bench/gpu.py and the driver's bindings, on a stand-in for the driver that only notes launches."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import bench_scripts
import fake_card
import pytest

TESTS = Path(__file__).parent
BENCH = TESTS.parent / "bench"
PATHS = {"PYTHONPATH": os.pathsep.join(os.path.abspath(path) for path in (BENCH, *sys.path))}

gpu = bench_scripts.load("gpu")


@pytest.fixture(scope="module")
def fake(tmp_path_factory):
    """A folder with a libcuda.so.1 and kernels that are but names."""
    folder = tmp_path_factory.mktemp("driver")
    fake_card.driver(folder)
    fake_card.names_only(folder / "kernels")
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


COPY = """
import numpy as np
from leangen_kernels.cuda import driver
numbers = np.arange(12, dtype=np.int32)
at = numbers.ctypes.data
driver.copy_within(0, [(at, at + 24), (at + 8, at + 40)], 8)
print(*numbers)
"""


def test_copies_within_a_card_leave_the_threads_context_as_it_was(fake):
    done, log = run_fake(fake, COPY)
    assert done.stdout == "6 7 10 11 4 5 6 7 8 9 10 11\n", done.stderr
    assert log == ["push", "pop", "release"]


def test_a_launch_reaches_the_driver_with_its_arguments(fake):
    code = OPEN + (
        "print(card.device.name, card.device.capability, card.multiprocessors)\n"
        "card.launch('rows_a8', (3, 1, 1), 64, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0.5)"
    )
    done, log = run_fake(fake, code)
    assert done.stdout == "Fake H100 (9, 0) 132\n", done.stderr
    assert log == ["rows_a8 3 1 1 64 1 1 2 3 4 5 6 7 8 9 0.5"]


def test_launches_overlap_where_the_card_can(fake):
    launch = "card.launch('merge_64', (1, 1, 1), 64, 1, 2, 3, 4, 5, 6)\n"
    code = f"{OPEN}{launch}card.overlaps = False\n{launch}"
    line = "merge_64 1 1 1 64 1 1 2 3 4 5 6"
    for major, wanted in (("8", [line, line]), ("9", ["overlaps", line, line])):
        done, log = run_fake(fake, code, FAKE_CUDA_MAJOR=major, FAKE_CUDA_OVERLAPS="1")
        assert (done.returncode, log) == (0, wanted), done.stderr


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
             "rows_a8", "linear_q4_a8_1x1", "rows_a8", "linear_q4_a8_2x1", "rows_a8",
             "linear_q4_a8_1x1"]  # fmt: skip
    assert names == [*layer, *layer, "rows_a8", "linear_q4_a8_1x1"]
    assert "graph" in log


ROWS = """
import sys, unittest.mock
sys.modules["torch"] = None
import gpu, gpu_rows, gpu_models
driver.Card = lambda index: card
gpu_rows.MATRICES, gpu_rows.TOKENS, gpu_rows.CONTEXTS = ((64, 128),), (2, 9, 17), (64,)
gpu_rows.PICTURES, gpu_rows.COPIED = ((32, 64),), 1 << 20
import gpu_peers
gpu_models.SHAPES = {"tiny": gpu_models.Shape(2, 64, 128, 2, 1, 64, 256)}
gpu_models.BATCHES, gpu_models.CONTEXT, gpu_models.UNET = (1, 3), 64, ((64, 64, 2),)
gpu_models.measured = lambda work, seconds: (work(), (2.0, 0.1, 0.5, 1))[1]
bench = gpu_rows.Bench(0, 0.01)
state = gpu.State(pathlib.Path(os.environ["STATE"]), {})
for part in gpu.PARTS:
    gpu.run_part(part, bench.rows(part), state, float("inf"), alive=bench.alive)
"""


def test_every_row_goes_through(fake, tmp_path):
    """On the stand-in, which computes nothing: no check passes, all else has figures."""
    kept = tmp_path / "s.json"
    done, _ = run_fake(fake, OPEN + ROWS, STATE=str(kept), FAKE_CUDA_BYTES="100000000000")
    assert done.returncode == 0, done.stderr
    measured = json.loads(kept.read_text())["rows"]
    assert all("expected at most" in row["error"] for row in measured["checks"].values())
    assert len(measured["checks"]) > 30
    for part in ("kernels", "peers", "models", "energy"):
        for name, row in measured[part].items():
            assert row.keys() & {"time_s", "joules", "absent", "note"}, (part, name, row)
    assert "no matrix rate" in measured["kernels"]["ceilings"]["note"]
    absent = [name for part in ("models", "energy") for name, row in measured[part].items()
              if "absent" in row]  # fmt: skip
    assert all("torch" in n or "onnxruntime" in n or "counter" in n for n in absent), absent


def test_what_a_failed_row_holds_is_given_back(fake):
    code = OPEN + (
        "import gpu_rows\n"
        "driver.Card = lambda index: card\n"
        "bench = gpu_rows.Bench(0, 0.01)\n"
        "card.empty(10, 'u1'), card.empty(20, 'u1')\n"
        "print(len(card._taken), bench.alive(), len(card._taken))"
    )
    assert run_fake(fake, code)[0].stdout == "2 True 0\n"


def test_a_card_without_kernels_is_no_success(fake, tmp_path):
    if list((TESTS.parent / "kernels" / "leangen_kernels" / "cuda").glob("leangen_cuda.*")):
        pytest.skip("kernels are built here")
    environment = {**os.environ, **PATHS, "LD_LIBRARY_PATH": str(fake)}
    done = subprocess.run(
        [sys.executable, BENCH / "gpu.py"], env=environment, capture_output=True, text=True,
        cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 2 and "error: no GPU kernels in" in done.stderr


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


def test_failures_can_be_tried_again(tmp_path):
    state = gpu.State(tmp_path / "s.json", {})
    for name, figures in {"a": {"time_s": 1}, "b": {"error": "x"}, "c": {"started": 2}}.items():
        state.put("peers", name, figures)
    state.put("energy", "d", {"absent": "no meter"})
    state.forget_failures(["peers"])
    kept = gpu.State(tmp_path / "s.json", {})
    assert list(kept.rows("peers")) == ["a"] and list(kept.rows("energy")) == ["d"]


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
