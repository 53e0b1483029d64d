from __future__ import annotations

from typing import Any

import pytest
from leangen_kernels.unroll import inlined, registers, static, unrolled

N = 0


@inlined
def add_rows(total: Any, row: Any, times: int) -> None:
    """Adds to registers of the caller's."""
    for i in static(N):
        total[i] += times * row[i]


def kernel(first: int, times: int) -> tuple[int, ...]:
    total, row = registers(), registers()
    for i in static(N):
        total[i] = 1
        row[i] = first + i
    add_rows(total, row, times)
    if N == 2:
        return total[0], total[1]
    return total[0], total[1], total[2]


def other_name(first: int) -> int:
    total, row = registers(), registers()
    total[0], row[0] = 1, first
    add_rows(total, row, first)
    result: int = total[0]
    return result


def test_loops_are_unrolled_and_parts_change_registers_of_the_kernel():
    assert unrolled(kernel, N=2)(5, 10) == (51, 61)
    assert unrolled(kernel, N=3)(5, 10) == (51, 61, 71)


def test_a_part_is_called_with_its_own_names():
    with pytest.raises(TypeError, match=r"add_rows takes \['total', 'row', 'times'\]"):
        unrolled(other_name, N=1)


def test_only_plain_functions_are_unrolled():
    with pytest.raises(TypeError, match="not a plain function"):
        unrolled(lambda first: first)
