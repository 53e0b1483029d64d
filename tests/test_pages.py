"""Memory that is taken page by page."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest

from leangen.families import pages


def resident_kb():
    return int(re.search(r"VmRSS:\s+(\d+)", Path("/proc/self/status").read_text())[1])


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="no /proc here")
def test_only_what_is_written_is_resident():
    before_kb = resident_kb()
    buffer = pages.zeros((64, 1 << 20))  # 256 MB
    assert buffer.dtype == np.float32
    buffer[:, :16] = 1.0
    assert resident_kb() - before_kb < 8_000
    assert buffer.sum() == 64 * 16
    assert buffer.flags.writeable
    buffer[:8] = 1.0
    assert resident_kb() - before_kb > 30_000
    del buffer
    assert resident_kb() - before_kb < 8_000


def test_more_than_there_is():
    with pytest.raises(MemoryError, match="cannot allocate"):
        pages.zeros((1 << 58,))


def test_an_empty_one():
    assert pages.zeros((0, 4)).shape == (0, 4)
