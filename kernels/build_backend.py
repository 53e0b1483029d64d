"""setuptools' build backend, which asks for Numba only where the kernels can be built with it.

Numba has no wheel for some platforms, and a build requirement that cannot be met would fail the
whole installation: without it leangen installs and runs on ONNX Runtime's own kernels. The library
is built only with LEANGEN_BUILD_KERNELS=1, as leangen runs no model on it yet.
"""

from __future__ import annotations

import os
import platform
import shutil
import sys

from setuptools import build_meta
from setuptools.build_meta import (  # noqa: F401  what a backend has to have
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

_NUMBA = ["numba>=0.61", "numpy"]


def _can_build() -> bool:
    compiler = os.environ.get("CC", "cc").split()[0]
    return (
        os.environ.get("LEANGEN_BUILD_KERNELS") == "1"
        and sys.platform == "linux"
        and platform.machine() in ("x86_64", "aarch64")
        and platform.libc_ver()[0] == "glibc"
        and sys.implementation.name == "cpython"
        and sys.version_info < (3, 15)
        and shutil.which(compiler) is not None
    )


def get_requires_for_build_wheel(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before it builds a wheel."""
    more = _NUMBA if _can_build() else []
    return build_meta.get_requires_for_build_wheel(config_settings) + more


def get_requires_for_build_editable(config_settings: dict[str, str] | None = None) -> list[str]:
    """What pip installs before an editable installation."""
    more = _NUMBA if _can_build() else []
    return build_meta.get_requires_for_build_editable(config_settings) + more
