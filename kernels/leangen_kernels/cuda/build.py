"""Compiles the GPU kernels ahead of time: Numba -> NVVM -> PTX of all, and machine code for some.

    python -m leangen_kernels.cuda.build FOLDER

No GPU and no driver is needed, but NVVM, NVRTC and `numba-cuda` (`pip install
'leangen[cuda-build]'`, or a CUDA toolkit). One file of PTX is for compute capability 8.0, one, with
launches that overlap, for 9.0 and newer: a driver compiles it for its card at the first load and
keeps the result. Where `ptxas` is on the PATH machine code for ARCHITECTURES is made too, and a
driver of their time or newer takes that.
"""

from __future__ import annotations

import argparse
import functools
import hashlib
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from leangen_kernels.cuda.driver import MACHINE_CODE, NAMES, PTX

CAPABILITY = (8, 0)
ARCHITECTURES = (80, 90, 100)
OLDEST_PTX = {80: "7.4", 90: "7.8"}
"""By what PTX is for: what the instructions ask for, as an older driver knows nothing of NVVM's."""
SHARED = ("instructions", "build")
"""Modules that every kernel depends on, beside its own."""


class BuildError(Exception):
    """The kernels cannot be compiled here; the message says why."""


def why_not() -> str | None:
    """Why the kernels cannot be compiled here, and what to change; None if they can."""
    try:
        import numba_cuda  # noqa: F401  Numba's own CUDA target is an older one
        from numba.cuda.cudadrv import nvrtc, nvvm

        nvvm.NVVM()
        nvrtc.get_supported_ccs()
    except Exception as error:  # each missing part raises a type of its own
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return f"no CUDA compiler for Numba ({reason[0]}): pip install 'leangen[cuda-build]'"
    return None


def kernels() -> dict[str, Any]:
    """Every kernel by name."""
    from leangen_kernels.cuda import attention, linear, norm, rows

    modules = (linear, rows, attention, norm)
    return {name: kernel for module in modules for name, kernel in module.kernels().items()}


def compile_ptx(name: str, kernel: Any, capability: tuple[int, int] = CAPABILITY) -> str:
    """The PTX of one kernel, an entry of that name."""
    from numba import cuda, types

    letters = {"i": types.int64, "f": types.float32}
    signature = types.void(*(letters[letter] for letter in kernel.letters))
    bounds = (kernel.threads, kernel.blocks)
    made, _ = cuda.compile(
        kernel.make(), signature, device=False, abi="numba", cc=capability, launch_bounds=bounds
    )
    text: str = made.decode() if isinstance(made, bytes) else made
    entry = re.search(r"\.visible \.entry (\w+)\(", text)
    if entry is None:
        raise BuildError(f"NVVM made no entry for {name}")
    # Names of its own, as all kernels share a file: its entry, its shared memory.
    text = text.replace(entry[1], f"leangen_{name}")
    text = re.sub(r"^.*NumbaEnv.*;$", "", text, flags=re.MULTILINE)
    return text.replace("_cudapy_smem", f"{name}_shared")


def _compile(name: str) -> str:
    return compile_ptx(name, kernels()[name])


def joined(texts: Iterable[str]) -> str:
    """One PTX file of several with the same head."""
    bodies, head = [], ""
    for text in texts:
        head, mark, body = text.partition(".address_size 64")
        bodies.append(re.sub(r"^//.*$", "", body, flags=re.MULTILINE).strip())
    target = re.search(r"\.target \w+", head)
    if target is None:
        raise BuildError("NVVM made no PTX")
    return f".version {OLDEST_PTX[80]}\n{target[0]}\n{mark}\n\n" + "\n\n".join(bodies) + "\n"


def overlapping(text: str) -> str:
    """The same PTX for 9.0 and newer, where launches overlap as far as `await_last` lets them."""
    text = text.replace(f".version {OLDEST_PTX[80]}", f".version {OLDEST_PTX[90]}", 1)
    text = text.replace(".target sm_80", ".target sm_90", 1)
    return re.sub(r"/\*sm_90:(.*?)\*/", r"\1", text)


def build(
    folder: Path,
    cache: Path,
    say: Callable[[str], None] = lambda line: None,
    machine_code: bool = True,
) -> list[Path]:
    """Write PTX, the list of kernels, and machine code where `ptxas` is; BuildError if not.

    `cache` keeps each kernel's PTX between builds, by what it is made from.
    """
    refusal = why_not()
    if refusal is not None:
        raise BuildError(refusal)
    cache.mkdir(parents=True, exist_ok=True)
    wanted = kernels()
    kept = {n: cache / f"{n}-{_digest(kernel.source)}.ptx" for n, kernel in wanted.items()}
    missing = [name for name, path in kept.items() if not path.exists()]
    # Numba compiles under a lock: processes do not share it. One that is forked has NVVM loaded.
    workers = len(os.sched_getaffinity(0))
    with ProcessPoolExecutor(workers, mp_context=get_context("fork")) as pool:
        for name, text in zip(missing, pool.map(_compile, missing), strict=True):
            _write(kept[name], text)
    say(f"{len(wanted)} GPU kernels, {len(missing)} of them compiled now")
    folder.mkdir(parents=True, exist_ok=True)
    text = joined(path.read_text() for path in kept.values())
    written = {80: folder / PTX.format(80), 90: folder / PTX.format(90)}
    _write(written[80], text)
    _write(written[90], overlapping(text))
    names = [f"{name} {kernel.letters} {kernel.threads}\n" for name, kernel in wanted.items()]
    _write(folder / NAMES, "".join(names))
    return [
        *written.values(),
        folder / NAMES,
        *(_machine_code(written, say) if machine_code else []),
    ]


def _write(path: Path, text: str) -> None:
    unfinished = path.with_suffix(".new")
    unfinished.write_text(text)
    unfinished.replace(path)


def assemble(ptx: Path, architecture: int, out: Path) -> str:
    """Machine code of a PTX file by `ptxas`; what it says of registers and spills."""
    command = ["ptxas", "-v", f"-arch=sm_{architecture}", str(ptx), "-o", str(out)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise BuildError(f"ptxas failed for sm_{architecture}: {done.stderr.strip()[:500]}")
    return done.stderr


def spills(report: str) -> dict[str, int]:
    """Bytes of local memory, by kernel, of those that `ptxas -v` says need any."""
    found = {}
    name = ""
    for line in report.splitlines():
        if entry := re.search(r"Compiling entry function '(\w+)'|properties for (\w+)", line):
            name = (entry[1] or entry[2]).removeprefix("leangen_")
        if (frame := re.search(r"(\d+) bytes stack frame", line)) and int(frame[1]):
            found[name] = int(frame[1])
    return found


def _machine_code(ptx: dict[int, Path], say: Callable[[str], None]) -> list[Path]:
    folder = ptx[80].parent
    for stale in folder.glob("leangen_cuda.sm_*.cubin"):
        stale.unlink()
    if shutil.which("ptxas") is None:
        say("no ptxas on the PATH: the driver will compile the PTX at the first load")
        return []
    made = []
    for architecture in ARCHITECTURES:
        out = folder / MACHINE_CODE.format(architecture)
        spilled = spills(assemble(ptx[min(architecture, 90)], architecture, out))
        said = ", ".join(f"{name} {count} B" for name, count in spilled.items())
        say(f"{out.name}, {out.stat().st_size / 1e3:.0f} kB; spills: {said or 'none'}")
        made.append(out)
    return made


@functools.cache
def _digest(source: str) -> str:
    """A hash of everything that the PTX of a module's kernels depends on."""
    import numba
    import numba_cuda

    folder = Path(__file__).parent
    parts = [numba.__version__.encode(), numba_cuda.__version__.encode()]
    parts += [(folder / f"{name}.py").read_bytes() for name in (source, *SHARED)]
    parts.append((folder.parent / "unroll.py").read_bytes())
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:16]


def main() -> int:
    """Build into a folder; prints the files."""
    parser = argparse.ArgumentParser(prog="leangen_kernels.cuda.build")
    parser.add_argument("folder", type=Path, nargs="?", default=Path(__file__).parent)
    parser.add_argument("--cache", type=Path, default=Path("build/kernels"))
    options = parser.parse_args()
    try:
        for path in build(options.folder, options.cache, lambda line: print(line, file=sys.stderr)):
            print(path)
    except BuildError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
