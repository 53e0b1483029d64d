"""Work in phases has no data race: under ThreadSanitizer, on threads that come when they like.

ONNX Runtime's own threads are not built for the sanitizer, so a small runner takes their place.
"""

import platform
import subprocess

import draws
import pytest
from kernels_machines import ROOT

NATIVE = ROOT / "kernels" / "native"
COMPILER = ["cc", "-std=c11", "-O1", "-g", "-fsanitize=thread", "-I", str(NATIVE)]
# The sanitizer of older compilers does not find its way in a memory as random as newer kernels'.
STRAIGHT = ["setarch", platform.machine(), "-R"]


def build(folder, phases):
    runner = folder / "runner"
    sources = [str(phases), str(ROOT / "tests" / "phases_runner.c")]
    subprocess.run([*COMPILER, *sources, "-pthread", "-o", str(runner)], check=True)
    return runner


def run(runner, threads, seed):
    return subprocess.run(
        [*STRAIGHT, str(runner), str(threads), str(seed)], capture_output=True, text=True
    )


@pytest.fixture
def sanitizer(tmp_path):
    """Skips where the compiler or the machine cannot do it."""
    (tmp_path / "empty.c").write_text("int main(void) { return 0; }\n")
    command = [*COMPILER, str(tmp_path / "empty.c"), "-o", str(tmp_path / "empty")]
    try:
        subprocess.run(command, check=True, capture_output=True)
        subprocess.run([*STRAIGHT, str(tmp_path / "empty")], check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"no ThreadSanitizer here: {error}")


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("threads", [1, 2, 4, 16])
def test_phases_have_no_data_race(tmp_path, threads):
    runner = build(tmp_path, NATIVE / "phases.c")
    done = run(runner, threads, int(draws.rng().integers(1 << 24)))
    assert not done.returncode and done.stdout == "ok\n", done


@pytest.mark.usefixtures("sanitizer")
@pytest.mark.parametrize("order", ["release", "acquire"])
def test_a_missing_order_would_be_found(tmp_path, order):
    source = (NATIVE / "phases.c").read_text()
    weaker = tmp_path / "phases.c"
    weaker.write_text(source.replace(f"memory_order_{order})", "memory_order_relaxed)"))
    assert weaker.read_text() != source
    runner = build(tmp_path, weaker)
    assert any("data race" in run(runner, 4, seed).stderr for seed in range(20))
