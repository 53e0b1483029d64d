"""Shared fixtures, and a header that says what this machine is."""

from __future__ import annotations

import gc
import os
from pathlib import Path

import draws
import hypothesis
import postgres_server
import pytest

# Matrices of tests are too small to share: NumPy's and torch's threads spent more on waiting.
for library in ("OPENBLAS", "MKL", "OMP"):
    os.environ.setdefault(f"{library}_NUM_THREADS", "1")


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config):
    """Hypothesis draws from the same seed, and nothing is too slow for it on a busy machine."""
    config.option.hypothesis_seed = str(draws.SEED)
    hypothesis.settings.register_profile(
        "leangen", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
    )
    hypothesis.settings.load_profile("leangen")


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item):
    draws.begin(item.nodeid)


@pytest.hookimpl(wrapper=True)
def pytest_collection():
    """Imports make nothing but what stays: looking for garbage among it took a quarter of them."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.freeze()
        gc.enable()


@pytest.fixture(autouse=True, scope="module")
def frozen():
    """What a module imported is not looked at in every later search for garbage, ours or Python's.

    With torch and transformers loaded there are a million objects: a second of each search.
    """
    yield
    gc.collect()
    gc.freeze()


def pytest_report_header():
    import onnxruntime

    from leangen import meters

    info = Path("/proc/cpuinfo")
    flags = info.read_text().split() if info.exists() else []
    wanted = ("avx2", "avx_vnni", "avx512_vnni", "asimddp")
    return [
        f"random data: LEANGEN_TEST_SEED={draws.SEED} (fresh: other data in every run)",
        f"onnxruntime {onnxruntime.__version__}, CPU: "
        + (" ".join(flag for flag in wanted if flag in flags) or "no known SIMD flag"),
        *(
            f"meter {row['sensor']}: {row['status']} {row['reason'] or ''}"
            for row in meters.describe(Path("/"))
        ),
    ]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """Every test has a store of its own; none touches the user's."""
    folder = tmp_path / "home"
    monkeypatch.setenv("LEANGEN_HOME", str(folder))
    return folder


@pytest.fixture(params=["file", "postgres"])
def place(request, tmp_path):
    """Where a new ledger may be made, by name: a path, or a database's address."""
    if request.param == "file":
        return lambda name: tmp_path / f"{name}.db"
    server = postgres_server.server()
    made = {}

    def address(name):
        if name not in made:
            made[name] = server.database()
        return made[name]

    return address
