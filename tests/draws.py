"""Random data of tests: the same in every run, so that a failure is one of the change.

What a test draws depends on LEANGEN_TEST_SEED and the test's name, never on what ran before it.
With `fresh` in that variable every run draws anew, and says the number that repeats it: what a new
kernel, or a new bound, should bear many times.
"""

from __future__ import annotations

import hashlib
import os
import random
import secrets
import sys

import numpy as np

_NAME = "LEANGEN_TEST_SEED"
if os.environ.setdefault(_NAME, "0") == "fresh":
    os.environ[_NAME] = str(secrets.randbits(32))
SEED = int(os.environ[_NAME])
"""Processes that a test starts, and other workers, find it in their environment."""

_root = np.random.SeedSequence(SEED)


def begin(name: str) -> None:
    """From here on it is this test that draws, also with Python's, NumPy's and torch's own."""
    global _root
    digest = hashlib.sha256(f"{SEED} {name}".encode()).digest()
    seed = int.from_bytes(digest[:4], "big")
    _root = np.random.SeedSequence([SEED, seed])
    random.seed(seed)
    np.random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)


def rng() -> np.random.Generator:
    """A generator of its own at each call."""
    return np.random.default_rng(_root.spawn(1)[0])
