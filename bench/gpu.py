"""Everything to be measured on an NVIDIA card, in under 8 minutes, as one table and JSON.

    python bench/gpu.py [--part checks|kernels|peers|models|energy] [--again] [--state gpu.json]
                        [--json OUT]

checks   every kernel against its NumPy twin on the card; also what compute-sanitizer is for:
         compute-sanitizer --target-processes all python bench/gpu.py --part checks --state s.json
kernels  the time, bytes and operations of each, and the card's copy bandwidth and matrix rate
peers    the same products by torch (fp16, bf16), bitsandbytes (4 bits) and ONNX Runtime
models   a token of SmolLM2-135M, a 1B and an 8B Llama by our kernels and by torch (random weights,
         one CUDA graph), an SD 1.5 UNet's products; terrain and piper-joe by ONNX Runtime on CUDA
energy   joules of those tokens at batch 1, 8 and 32 by NVML's counter, above an idle baseline with
         the context alive; the counter against the power it shows

Each row is kept in the state file as soon as it is measured: started again, the script goes on
where it was; --again also takes up rows that failed. A row that breaks the card's context is
marked, and the part starts again after it. What a row needs and this machine lacks is said in its
place. The card's settings stay as they are. The exit status is 0 if no row failed or was left out.

Without a compiled `leangen_kernels/cuda` run python -m leangen_kernels.cuda.build first.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PARTS = ("checks", "kernels", "peers", "models", "energy")
BUDGET_S = 450.0
"""No row is started after so long, all parts together."""
TRIES = 2
"""A row that ends its process is left out after so many."""
CRASHED = 75
"""The exit status of a part whose last row left the card unusable."""
VERSIONS = ("leangen", "numpy", "torch", "bitsandbytes", "onnxruntime-gpu", "numba-cuda")

Figures = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """One line of the table; `run` gives figures, or {"absent": why}."""

    name: str
    run: Callable[[], Figures]


class State:
    """What has been measured so far, on one card."""

    def __init__(self, path: Path, card: Figures) -> None:
        self.path = path
        self.data: Figures = {"card": card, "rows": {part: {} for part in PARTS}}
        if path.exists():
            kept = json.loads(path.read_text())
            if kept.get("card") == card:
                self.data = kept
            else:
                print(f"{path} is of another card or version: starting anew", file=sys.stderr)

    def forget_failures(self, parts: Iterable[str]) -> None:
        """Drop the rows of these parts that came to no figures, so that they are tried again."""
        for part in parts:
            for name, figures in list(self.rows(part).items()):
                if figures.keys() & {"error", "absent", "started"}:
                    del self.rows(part)[name]
        self.write()

    def rows(self, part: str) -> dict[str, Figures]:
        """The rows of one part by name."""
        rows: dict[str, Figures] = self.data["rows"][part]
        return rows

    def put(self, part: str, name: str, figures: Figures) -> None:
        """Keep a row."""
        self.rows(part)[name] = figures
        self.write()

    def write(self) -> None:
        """Write the file, which is whole at any moment."""
        unfinished = self.path.with_suffix(".new")
        unfinished.write_text(json.dumps(self.data, indent=1) + "\n")
        unfinished.replace(self.path)


def run_part(
    part: str,
    rows: Iterable[Row],
    state: State,
    until: float,
    clock: Callable[[], float] = time.monotonic,
    alive: Callable[[], bool] = lambda: True,
) -> int:
    """Measure the rows that the state lacks. CRASHED when the card is lost, 1 after an error.

    `alive`, asked after each row, gives its memory back and says whether the card's context works.
    """
    status = 0
    for row in rows:
        before = state.rows(part).get(row.name, {})
        if before.get("started", TRIES) >= TRIES and before:
            continue
        if clock() >= until:
            print(f"{part}: no time left for {row.name!r}; run it again to go on", file=sys.stderr)
            return 1
        # Kept before, so that a row that takes the process with it is not tried for ever.
        state.put(part, row.name, {"started": before.get("started", 0) + 1})
        print(f"{part}: {row.name} ...", file=sys.stderr, flush=True)
        try:
            figures = row.run()
        except Exception as error:  # whatever a peer or the driver raises: the others go on
            figures = {"error": f"{type(error).__name__}: {error}"[:300]}
        state.put(part, row.name, figures)
        if not alive():
            return CRASHED
        status |= "error" in figures
    return status


def of_roofline(figures: Figures, ceilings: Figures) -> float | None:
    """The larger of the shares of copy bandwidth and matrix rate; None where neither is known."""
    if "time_s" not in figures:
        return None
    reached = (
        (figures.get("bytes"), ceilings.get("copy_bytes_s")),
        (figures.get("flop"), ceilings.get("matrix_flop_s")),
    )
    shares = [done / figures["time_s"] / most for done, most in reached if done and most]
    return max(shares, default=None)


def table(data: Figures) -> Iterator[str]:
    """The table as lines."""
    ceilings = data["rows"]["kernels"].get("ceilings", {})
    yield f"{'part':8}{'row':46}{'time':>11}{'GB/s':>8}{'TFLOP/s':>9}{'roof':>6}  J per unit"
    for part, rows in data["rows"].items():
        for name, figures in rows.items():
            head = f"{part:8}{name:46}"
            if told := figures.get("absent") or figures.get("error"):
                yield f"{head}{told}"
                continue
            if "started" in figures:
                yield f"{head}did not come to an end"
                continue
            seconds = figures.get("time_s")
            cells = [
                "" if seconds is None else f"{seconds * 1e6:.1f} us",
                _rate(figures.get("bytes"), seconds, 1e9, ".0f"),
                _rate(figures.get("flop"), seconds, 1e12, ".1f"),
            ]
            share = of_roofline(figures, ceilings)
            roof = "" if share is None else f"{share:.0%}"
            line = f"{head}{cells[0]:>11}{cells[1]:>8}{cells[2]:>9}{roof:>6}  "
            if figures.get("joules") is not None:
                unit = f" {figures['unit']}" if "unit" in figures else ""
                line += f"{figures['joules']:.4g} ± {figures['u_joules']:.2g}{unit} "
            yield (line + figures.get("note", "")).rstrip()


def _rate(amount: float | None, seconds: float | None, scale: float, form: str) -> str:
    return "" if not amount or not seconds else format(amount / seconds / scale, form)


def describe(device: Any, loaded: Path) -> Figures:
    """The card, the driver and the versions that the figures are of."""
    from hashlib import sha256

    versions = {}
    for name in VERSIONS:
        try:
            versions[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            versions[name] = None
    asked = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "-i"]
    try:
        done = subprocess.run([*asked, str(device.index)], capture_output=True, text=True)
        driver = done.stdout.strip() or None
    except FileNotFoundError:
        driver = None
    return {
        "name": device.name, "capability": list(device.capability), "driver": driver,
        "memory_bytes": device.memory_bytes, "python": platform.python_version(),
        "kernels": f"{loaded.name} {sha256(loaded.read_bytes()).hexdigest()[:12]}",
        "versions": versions,
    }  # fmt: skip


def main() -> int:
    """Measure what is missing, print the table."""
    parser = argparse.ArgumentParser(
        prog="bench/gpu.py",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--part", choices=PARTS, help="this one alone")
    parser.add_argument("--again", action="store_true", help="try rows again that failed")
    parser.add_argument("--device", type=int, default=0, help="of the driver's count")
    parser.add_argument("--state", type=Path, default=Path("gpu.json"), help="what is measured")
    parser.add_argument("--json", type=Path, help="write all figures here too")
    parser.add_argument("--seconds", type=float, default=0.15, help="for one timing")
    parser.add_argument("--until", type=float, help=argparse.SUPPRESS)
    options = parser.parse_args()
    begin = time.monotonic()
    from leangen_kernels.cuda import driver

    try:
        device = driver.devices()[options.device]
    except (driver.CudaError, IndexError) as error:
        print(f"no card: {error if isinstance(error, driver.CudaError) else 'the driver has none'}")
        if options.json:
            options.json.write_text(json.dumps({"card": None, "reason": str(error)}) + "\n")
        return 0
    try:
        loaded = driver.compiled(device.capability)
    except driver.CudaError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    card = describe(device, loaded)
    if options.part and options.until is not None:  # a process of its own for one part
        import gpu_rows

        measured = gpu_rows.Bench(options.device, options.seconds)
        state = State(options.state, card)
        rows = measured.rows(options.part)
        return run_part(options.part, rows, state, options.until, alive=measured.alive)
    status = 0
    parts = [options.part] if options.part else PARTS
    if options.again:
        State(options.state, card).forget_failures(parts)
    for part in parts:
        status |= _run_apart(part, options, begin + BUDGET_S)
    state = State(options.state, card)
    rows = (row for part in parts for row in state.rows(part).values())
    status |= any(row.keys() & {"error", "started"} for row in rows)
    data = {**state.data, "seconds": time.monotonic() - begin}
    print("\n".join([f"{card['name']}, driver {card['driver']}", *table(data)]))
    if options.json:
        options.json.write_text(json.dumps(data, indent=1) + "\n")
    return status


def _run_apart(part: str, options: argparse.Namespace, until: float) -> int:
    """One part in processes of its own: a lost context is gone with its process."""
    command = [sys.executable, __file__, "--part", part, "--state", str(options.state),
               "--device", str(options.device), "--seconds", str(options.seconds),
               "--until", str(until)]  # fmt: skip
    status = CRASHED
    while (status == CRASHED or status < 0) and time.monotonic() < until:
        status = subprocess.run(command).returncode
    return 1 if status else 0


if __name__ == "__main__":
    sys.exit(main())
