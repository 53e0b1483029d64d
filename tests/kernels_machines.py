"""Ways to call one compiled kernel from a test: in this process, or under an emulator."""

from __future__ import annotations

import ctypes
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import leangen_kernels
import numpy as np
import pytest
from leangen_kernels import variants

ROOT = Path(__file__).resolve().parents[1]
LIBRARY = Path(leangen_kernels.__file__).parent / "libleangen_kernels.so"


class Here:
    """The kernels of one variant in this process. Arrays are passed by address and written to."""

    def __init__(self, variant):
        if not LIBRARY.exists():
            pytest.skip("the kernel library is not built: " + leangen_kernels.status()[1])
        self.variant = variant
        self.native = ctypes.CDLL(str(LIBRARY))
        self.native.leangen_kernels_find.restype = ctypes.c_void_p
        if self.find("add") is None:
            pytest.skip(f"this CPU does not run {variant}")

    def has(self, name):
        return self.find(name) is not None

    def find(self, name):
        return self.native.leangen_kernels_find(self.variant.encode(), name.encode())

    def call(self, name, *arguments):
        address = self.find(name)
        assert address is not None, f"no kernel {name}"
        nothing, exception = ctypes.c_void_p(), ctypes.c_void_p()
        given = [ctypes.byref(nothing), ctypes.byref(exception)]
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                given.append(ctypes.c_int64(argument.ctypes.data))
            elif isinstance(argument, float):
                given.append(ctypes.c_double(argument))
            else:
                given.append(ctypes.c_int64(argument))
        assert ctypes.CFUNCTYPE(ctypes.c_int)(address)(*given) == 0


class Emulated:
    """The kernels of one aarch64 variant under qemu; a context manager, which ends it."""

    def __init__(self, variant, folder):
        compiler, emulator = "aarch64-linux-gnu-gcc", "qemu-aarch64"
        for tool in (compiler, emulator):
            if shutil.which(tool) is None:
                pytest.skip(f"{tool} is not installed")
        pytest.importorskip("numba")
        self.variant, runner = variant, folder / "runner"
        if not runner.exists():
            _run(
                sys.executable, "-m", "leangen_kernels.build", folder, "--machine", "aarch64",
                "--cc", compiler, "--cache", ROOT / "build" / "kernels", cwd=ROOT / "kernels",
            )  # fmt: skip
            _run(
                compiler, "-O1", ROOT / "tests" / "kernels_runner.c",
                folder / "libleangen_kernels.so", f"-Wl,-rpath,{folder}", "-o", runner,
            )  # fmt: skip
        prefix = ["-L", "/usr/aarch64-linux-gnu", "-cpu", "max"]
        self.process = subprocess.Popen(
            [emulator, *prefix, str(runner), variant],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    def __enter__(self):
        return self

    def __exit__(self, *error):
        with self.process:  # closes what it reads and writes, and waits
            pass

    def has(self, name):
        """Whether the library holds it: kernels are named in the table that it was built from."""
        tables = (ROOT / "build" / "kernels").glob("table-aarch64-*.inc")
        newest = max(tables, key=lambda path: path.stat().st_mtime)
        return f'"{self.variant}", "{name}"' in newest.read_text()

    def call(self, name, *arguments):
        sent = b"k" + struct.pack("<q", len(name)) + name.encode()
        arrays = [argument for argument in arguments if isinstance(argument, np.ndarray)]
        for argument in arguments:
            if isinstance(argument, np.ndarray):
                sent += b"b" + struct.pack("<q", argument.nbytes) + argument.tobytes()
            elif isinstance(argument, float):
                sent += b"d" + struct.pack("<d", argument)
            else:
                sent += b"i" + struct.pack("<q", argument)
        self.process.stdin.write(sent + b".")
        self.process.stdin.flush()
        for array in arrays:
            back = self.process.stdout.read(array.nbytes)
            assert len(back) == array.nbytes, f"{name} ended with {self.process.wait()}"
            array[...] = np.frombuffer(back, array.dtype).reshape(array.shape)


def _run(*command, cwd=None):
    subprocess.run([str(word) for word in command], check=True, cwd=cwd)


def here():
    """The variants that were built for this machine."""
    import platform

    return [variant.name for variant in variants.of(platform.machine())]
