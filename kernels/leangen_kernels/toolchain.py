"""Whether the kernels can be built here: asked by the build backend, before Numba is fetched."""

from __future__ import annotations

import importlib.util
import os
import platform
import shlex
import shutil
import sys
import sysconfig

from leangen_kernels import variants

COMPILERS = ("cc", "gcc", "clang")
"""Tried in turn where neither the caller nor $CC names one."""

NUMBA_BELOW = (3, 15)
"""The first CPython that Numba has no wheel for."""


def why_not(machine: str | None = None, compiler: str | None = None) -> str | None:
    """Why this Python cannot build a library for `machine`, and what to change; None if it can.

    That Numba is installed is not asked: the installation fetches it where this says None.
    """
    machine = machine or platform.machine()
    return _no_kernels(machine) or _no_numba() or _no_compiler(compiler)


def compiler_command(given: str | None = None) -> list[str]:
    """The C compiler and its options; empty when none is on the PATH."""
    given = given or os.environ.get("CC")
    commands = [shlex.split(given)] if given else [[name] for name in COMPILERS]
    return next((command for command in commands if command and shutil.which(command[0])), [])


def _no_kernels(machine: str) -> str | None:
    glibc = platform.libc_ver()[0] == "glibc"
    if sys.platform == "linux" and glibc and variants.of(machine):
        return None
    systems = {"linux": "Linux" if glibc else "Linux without glibc"}
    systems |= {"darwin": "macOS", "win32": "Windows"}
    return (
        "the kernels are for Linux with glibc on x86-64 and aarch64, and this is "
        f"{systems.get(sys.platform, sys.platform)} on {machine}"
    )


def _no_numba() -> str | None:
    has_wheel = (
        sys.implementation.name == "cpython"
        and sys.version_info[:2] < NUMBA_BELOW
        and not sysconfig.get_config_var("Py_GIL_DISABLED")
    )
    if has_wheel or importlib.util.find_spec("numba") is not None:
        return None
    return (
        "Numba, which compiles the kernels, has no wheel for this Python "
        f"({platform.python_implementation()} {platform.python_version()}): install leangen "
        f"with CPython {NUMBA_BELOW[0]}.{NUMBA_BELOW[1] - 1} or older, not free-threaded"
    )


def _no_compiler(given: str | None) -> str | None:
    if compiler_command(given):
        return None
    given = given or os.environ.get("CC")
    missing = f"{given} is" if given else f"{', '.join(COMPILERS[:-1])} and {COMPILERS[-1]} are"
    return f"no C compiler: {missing} not on the PATH; install gcc, then leangen again"
