"""setuptools' build backend, which asks for Numba only where the kernels can be built with it.

Numba has no wheel for some platforms, and a build requirement that cannot be met would fail the
whole installation: without it leangen installs and runs on ONNX Runtime's own kernels.
LEANGEN_BUILD_KERNELS=0 leaves the kernels out; LEANGEN_BUILD_CUDA=1 adds those for NVIDIA cards.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  what a backend has to have
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

sys.path.insert(0, str(Path(__file__).resolve().parent))
from leangen_kernels import toolchain  # of these sources, not an installed one

sys.path.pop(0)


def _numba() -> list[str]:
    if os.environ.get("LEANGEN_BUILD_KERNELS") == "0" or toolchain.why_not():
        return []
    cuda = ["numba-cuda[cu13]>=0.20"] if os.environ.get("LEANGEN_BUILD_CUDA") == "1" else []
    return ["numba>=0.61", "numpy", *cuda]


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    return build_meta.get_requires_for_build_wheel(config_settings) + _numba()


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before an editable installation."""
    return build_meta.get_requires_for_build_editable(config_settings) + _numba()
