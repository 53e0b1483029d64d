"""The published models and data, for slow tests: fetched once into a store of the tests' own."""

from __future__ import annotations

import os
from functools import cache
from pathlib import Path

import pytest

from leangen.errors import LeangenError
from leangen.store import Store


@cache
def store() -> Store:
    """`$LEANGEN_TEST_HOME`, else a folder beside pytest's cache that later runs use again."""
    home = os.environ.get("LEANGEN_TEST_HOME")
    return Store(Path(home) if home else Path(".pytest_cache/leangen-home").absolute())


def source(name: str) -> Path:
    """The file of a catalog model or data entry; the test is skipped where it cannot be had."""
    try:
        return store().data(name)
    except LeangenError as error:
        pytest.skip(f"{name} cannot be fetched here: {error}")
