"""What leangen finds on this machine: what works, what does not, and what would mend it."""

from __future__ import annotations

import importlib
import os
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Literal

import leangen_kernels

from leangen import devices, environment, meters, threads
from leangen.console import human_bytes
from leangen.errors import LeangenError
from leangen.ledger import Ledger
from leangen.store import Store

Status = Literal["ok", "note", "problem"]

CPU_FEATURES = ("avx2", "fma", "f16c", "avx_vnni", "avx512f", "avx512_vnni", "asimddp", "i8mm")
"""What /proc/cpuinfo says that kernels, ours and ONNX Runtime's, look for."""

LEAST_FREE_BYTES = 2_000_000_000
"""Of disk: a model's download and its bundles take 0.1 to 1 GB."""

LEAST_MEMORY_BYTES = 500_000_000

OF_DEVELOPERS = ("dev", "test", "cuda-build")
"""Extras that nobody needs to run a model."""

REMEDIES = {
    "governor": "sudo cpupower frequency-set --governor performance",
    "boost": "for measurements: echo 0 | sudo tee /sys/devices/system/cpu/cpufreq/boost "
    "(Intel: echo 1 to intel_pstate/no_turbo)",
    "throttled": "better cooling, or shorter measurements with pauses",
    "busy": "end other programs before measuring",
}
"""By a word of `environment.warnings`."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at. A `problem` should be mended, a `note` need not be."""

    what: str
    status: Status
    detail: str
    remedy: str | None = None


def examine(root: Path = Path("/"), home: Path | None = None) -> list[Finding]:
    """Everything there is to know, in a few seconds; `root` stands in for /, `home` for the store.

    Nothing is changed, and the store's folder is not made.
    """
    store = Store(home)
    checks: tuple[Callable[[], Iterator[Finding]], ...] = (
        system,
        lambda: processor(root),
        lambda: memory(root),
        runtime,
        gpu,
        kernels,
        lambda: energy(root),
        lambda: measuring(root),
        lambda: storage(store),
        lambda: ledger(store.ledger_path),
        extras,
    )
    return [finding for check in checks for finding in check()]


def system() -> Iterator[Finding]:
    """leangen, Python and the operating system."""
    version = _version("leangen")
    if version is None:
        yield Finding("leangen", "note", "a source tree that is not installed", "pip install -e .")
    else:
        yield Finding("leangen", "ok", version)
    yield Finding("python", "ok", f"{platform.python_implementation()} {platform.python_version()}")
    libc = " ".join(filter(None, platform.libc_ver()))
    known = f"{platform.system()} {platform.release()} {platform.machine()} {libc}".strip()
    if sys.platform == "linux":
        yield Finding("system", "ok", known)
    else:
        yield Finding("system", "note", f"{known}: leangen is tested on Linux only")


def processor(root: Path) -> Iterator[Finding]:
    """The CPU, what it can do, and how many threads are used."""
    lines = (_text(root / "proc/cpuinfo") or "").splitlines()
    listed = [line for line in lines if line.startswith(("flags", "Features"))]
    flags = set(listed[0].partition(":")[2].split()) if listed else set()
    found = [feature for feature in CPU_FEATURES if feature in flags]
    name = environment.conditions(root)["cpu"] or platform.processor() or "unknown"
    yield Finding("cpu", "ok", f"{name}: {' '.join(found) or 'no known vector instructions'}")
    count, why = threads.choose(None, root=root)
    yield Finding("threads", "ok", f"{count}: {why}")


def memory(root: Path) -> Iterator[Finding]:
    """Memory in all and to be had."""
    lines = (_text(root / "proc/meminfo") or "").splitlines()
    fields = {name: rest.split()[0] for name, _, rest in (line.partition(":") for line in lines)}
    if not {"MemTotal", "MemAvailable"} <= fields.keys():
        yield Finding("memory", "note", "this system does not tell")
        return
    total, available = (int(fields[name]) * 1024 for name in ("MemTotal", "MemAvailable"))
    detail = f"{human_bytes(available)} available of {human_bytes(total)}"
    if available < LEAST_MEMORY_BYTES:
        yield Finding("memory", "problem", detail, "end other programs: models may not fit")
    else:
        yield Finding("memory", "ok", detail)


def runtime() -> Iterator[Finding]:
    """ONNX Runtime and what it can run on."""
    installed = [name for name in ("onnxruntime", "onnxruntime-gpu") if _version(name)]
    try:
        ort = importlib.import_module("onnxruntime")
    except ImportError as error:
        remedy = "pip install --force-reinstall onnxruntime"
        yield Finding("onnxruntime", "problem", f"cannot be imported: {error}", remedy)
        return
    detail = f"{ort.__version__}: {', '.join(ort.get_available_providers())}"
    if len(installed) > 1:
        both = f"{detail}; {' and '.join(installed)} share a folder, what came last is in it"
        remedy = f"pip uninstall {' '.join(installed)}, then install the one that you want"
        yield Finding("onnxruntime", "note", both, remedy)
    else:
        yield Finding("onnxruntime", "ok", detail)


def gpu() -> Iterator[Finding]:
    """NVIDIA cards, and what it takes to run on one."""
    from leangen_kernels.cuda import driver

    try:
        cards = driver.devices()
    except driver.CudaError as error:
        yield Finding("gpu", "note", str(error))
        return
    if not cards:
        yield Finding("gpu", "note", "the NVIDIA driver lists no card")
        return
    names = ", ".join(f"cuda:{card.index} {card.name}" for card in cards)
    try:
        chosen = devices.choose("cuda")
        built = driver.compiled(cards[0].capability).name
    except (LeangenError, driver.CudaError) as error:
        reason, _, remedy = str(error).removeprefix("--device cuda: ").partition(": ")
        yield Finding("gpu", "note", f"{names}: {reason}", remedy or None)
        return
    yield Finding("gpu", "note", f"{names}: {built}; {devices.NOT_YET}: {chosen.name} is tried with"
                  " --device cuda")  # fmt: skip


def kernels() -> Iterator[Finding]:
    """leangen's own kernels: which ones and why, and whether they compute what they should."""
    variant, why = leangen_kernels.status()
    if variant is None:
        # A reason names its remedy after a semicolon; without one there is nothing to mend here.
        reason, _, remedy = why.partition("; ")
        status: Status = "problem" if remedy else "note"
        detail = f"{reason}: ONNX Runtime's own run everything"
        yield Finding("kernels", status, detail, remedy or None)
        return
    yield Finding("kernels", "ok", f"{variant}: {why}")
    if newer := _newer_sources(Path(leangen_kernels.__file__).parent):
        detail = f"the library is older than {newer}, from which it is made"
        yield Finding("kernels", "problem", detail, "pip install -e .")
    from leangen_kernels import selftest

    results = selftest.results_apart()
    wrong = {name: problem for name, problem in results.items() if problem is not None}
    for name, problem in wrong.items():
        remedy = "LEANGEN_KERNELS=portable, or off, avoids these kernels; please report this"
        yield Finding("self-test", "problem", f"{name}: {problem}", remedy)
    if not wrong:
        yield Finding("self-test", "ok", f"{', '.join(results)} agree with NumPy")


def _newer_sources(package: Path) -> str | None:
    """A source that changed since the library was built; only a source tree has the C part."""
    from leangen_kernels import build

    native = package.parent / "native"
    if not native.is_dir():
        return None
    sources = [*native.glob("*.[ch]"), *(package / f"{name}.py" for name in build.SOURCES)]
    newest = max(sources, key=lambda path: path.stat().st_mtime)
    built = (package / build.LIBRARY).stat().st_mtime
    return newest.name if newest.stat().st_mtime > built else None


def energy(root: Path) -> Iterator[Finding]:
    """What measures energy here, and what would enable the sensors that cannot be read."""
    rows = meters.describe(root)
    chosen = [row for row in rows if row["status"] == "in total"]
    names = ", ".join(f"{row['sensor']} ({row['source']})" for row in chosen)
    measured = any(row["source"] != "estimated" for row in chosen)
    yield Finding("energy", "ok" if measured else "note", names or "nothing measures energy here")
    for row in rows:
        if row["status"] == "unavailable":
            yield Finding("energy", "note", f"{row['sensor']}: {row['reason']}", row["remedy"])


def measuring(root: Path) -> Iterator[Finding]:
    """What disturbs measurements."""
    warnings = environment.warnings(environment.conditions(root))
    for text in warnings:
        words = re.findall(r"\w+", text.partition(": ")[0])
        remedies = [REMEDIES[word] for word in words if word in REMEDIES]
        yield Finding("measuring", "note", text, remedies[0] if remedies else None)
    if not warnings:
        yield Finding("measuring", "ok", "nothing seen that makes timings less repeatable")


def storage(store: Store) -> Iterator[Finding]:
    """Where models are kept, and whether there is room."""
    home = store.home
    there = next(folder for folder in (home, *home.parents) if folder.is_dir())
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        detail = f"{home} cannot be written: {error.strerror}"
        yield Finding("store", "problem", detail, "set LEANGEN_HOME to a folder that can be")
        return
    free = shutil.disk_usage(there).free
    held = sum(row["bytes"] for row in store.usage())
    detail = f"{home}: {human_bytes(held)} used, {human_bytes(free)} free"
    if free < LEAST_FREE_BYTES:
        yield Finding("store", "problem", detail, "leangen gc, leangen rm, or another LEANGEN_HOME")
    else:
        yield Finding("store", "ok", detail)


def ledger(path: Path | str) -> Iterator[Finding]:
    """Whether the ledger can be written and holds what was written."""
    if isinstance(path, Path) and not path.exists():
        yield Finding("ledger", "ok", f"{path}: none yet, the first generation makes it")
        return
    try:
        with Ledger(path) as book:
            shown = str(book)  # without a password
            found = book.verify()
    except LeangenError as error:
        remedy = f"move {path} away: a new one is made" if isinstance(path, Path) else None
        yield Finding("ledger", "problem", str(error), remedy)
        return
    if found.problems:
        remedy = f"keep a copy of {shown} for an inquiry, then move it away: a new one is made"
        more = f" (and {len(found.problems) - 1} more)" if len(found.problems) > 1 else ""
        yield Finding("ledger", "problem", f"{shown}: {found.problems[0]}{more}", remedy)
    elif isinstance(path, Path) and not os.access(path, os.W_OK):
        yield Finding("ledger", "problem", f"{path} cannot be written", f"chmod u+w {path}")
    else:
        detail = f"{shown}: {found.rows} rows as they were written, head {found.head[:16]}"
        yield Finding("ledger", "ok", detail)


def extras() -> Iterator[Finding]:
    """Optional parts: there, or how to get them."""
    try:
        needs = metadata.requires("leangen") or []
    except metadata.PackageNotFoundError:
        return  # a source tree: `system` says so
    by_extra: dict[str, list[str]] = {}
    for need in needs:
        if extra := re.search(r"extra == ['\"]([\w-]+)['\"]", need):
            name = re.match(r"[\w.-]+", need)
            by_extra.setdefault(extra[1], []).append(name[0] if name else need)
    for extra_name, packages in by_extra.items():
        if extra_name in OF_DEVELOPERS:
            continue
        missing = [name for name in packages if _version(name) is None]
        if missing:
            remedy = f"pip install 'leangen[{extra_name}]'"
            detail = f"{extra_name}: {', '.join(missing)} not installed"
            yield Finding("extra", "note", detail, remedy)
        else:
            yield Finding("extra", "ok", f"{extra_name}: {', '.join(packages)}")


def _version(distribution: str) -> str | None:
    try:
        return metadata.version(distribution)
    except metadata.PackageNotFoundError:
        return None


def _text(path: Path) -> str | None:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
