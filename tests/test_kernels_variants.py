"""Which variant is used, why, and that every one computes what it should."""

import json
import os
import re
import subprocess
import sys

import leangen_kernels
import numpy as np
import onnx
import pytest
from kernels_machines import ROOT, here
from leangen_kernels import reference, selftest

needs_library = pytest.mark.skipif(
    not leangen_kernels._LIBRARY.exists(), reason="no kernels: " + leangen_kernels.status()[1]
)


def python(*arguments, forced):
    environment = {**os.environ, "LEANGEN_KERNELS": forced}
    return subprocess.run(
        [sys.executable, *arguments], env=environment, capture_output=True, text=True
    )


def status(forced):
    code = "import json, leangen_kernels as k; print(json.dumps(k.status()))"
    return tuple(json.loads(python("-c", code, forced=forced).stdout))


@needs_library
def test_the_first_variant_that_runs_is_chosen_and_what_it_is_preferred_to_is_told():
    chosen, why = status("")
    faster = here()[: here().index(chosen)]
    for name in faster:
        assert status(name)[0] is None
    told = ", ".join(faster)
    assert why.endswith(f"it lacks {told}" if faster else "this CPU runs it")


@needs_library
@pytest.mark.parametrize("variant", here())
def test_a_forced_variant_runs_every_operator_or_says_what_the_cpu_lacks(variant):
    chosen, why = status(variant)
    if chosen is None:
        assert why == (
            f"LEANGEN_KERNELS={variant}, but this CPU lacks its instructions; "
            "unset it to choose by CPU"
        )
        return
    assert (chosen, why) == (variant, f"forced by LEANGEN_KERNELS={variant}")
    done = python("-m", "leangen_kernels.selftest", forced=variant)
    assert json.loads(done.stdout) == dict.fromkeys(selftest.OPERATORS), done.stderr


@needs_library
def test_an_unknown_variant_is_answered_with_those_there_are():
    known = ", ".join([*here(), "off"])
    why = f"LEANGEN_KERNELS=mmx is none of {known}; unset it to choose by CPU"
    assert status("mmx") == (None, why)


def test_off_is_off():
    assert status("off") == (None, "switched off by LEANGEN_KERNELS=off")


def test_every_operator_has_a_self_test():
    """But those on a card, of which there may be none: `bench/gpu.py` checks them."""
    sources = (ROOT / "kernels" / "native").glob("*.c")
    named = r'^OPERATOR\(\w+, "(\w+)"'
    names = {name for source in sources for name in re.findall(named, source.read_text(), re.M)}
    assert {name for name in names if not name.startswith("Cuda")} == selftest.OPERATORS.keys()


@pytest.mark.skipif(
    leangen_kernels.library() is None, reason="no kernels: " + leangen_kernels.status()[1]
)
def test_a_wrong_result_and_a_refusal_are_told(monkeypatch):
    assert onnx  # loaded before: its number types register with the real cosine
    right = reference.linear
    monkeypatch.setattr(reference, "linear", lambda *a, **k: right(*a, **k) * 1.01)
    monkeypatch.setattr(np, "cos", lambda angles: np.ones((1, 3), np.float32))
    found = selftest.results()
    assert re.fullmatch(r"differs from its NumPy twin by \S+ of the largest value", found["Linear"])
    assert "Attention" in found["Attention"]


def test_a_crash_ends_the_other_process_only(monkeypatch, tmp_path):
    (tmp_path / "python").write_text("#!/bin/sh\necho oh >&2\nkill -ILL $$\n")
    (tmp_path / "python").chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(tmp_path / "python"))
    assert selftest.results_apart() == {"process": "ended with exit status -4: oh"}
