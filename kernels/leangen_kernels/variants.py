"""The instruction sets that the kernels are compiled for, and how one is named for LLVM."""

from __future__ import annotations

import os
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Variant:
    """One instruction set. `cpu` and `features` are LLVM's names for it."""

    name: str
    machine: str
    """As `platform.machine()` says it."""
    cpu: str
    features: str
    dot: str
    """How four products are summed: a key of `dots.DOT`."""


VARIANTS = (
    Variant("avx512", "x86_64", "x86-64-v4", "+avx512vnni", "vnni512"),
    Variant("avxvnni", "x86_64", "x86-64-v3", "+avxvnni", "vnni256"),
    Variant("avx2", "x86_64", "x86-64-v3", "", "avx2"),
    Variant("portable", "x86_64", "x86-64", "", "portable"),
    Variant("neon", "aarch64", "generic", "+dotprod", "neon"),
    Variant("portable", "aarch64", "generic", "", "portable"),
)
"""Fastest first: the first that the CPU can run is used."""

BUILD_VARIABLE = "LEANGEN_KERNELS_BUILD"
"""Set by `build` in the subprocess that compiles one variant: `machine/name`."""


def of(machine: str) -> list[Variant]:
    """The variants of one architecture, fastest first; none where it is not supported."""
    return [variant for variant in VARIANTS if variant.machine == machine]


def current() -> Variant:
    """The variant that this process compiles."""
    machine, _, name = os.environ.get(BUILD_VARIABLE, "x86_64/portable").partition("/")
    return next(variant for variant in of(machine) if variant.name == name)
