"""How quick a ledger is: appending one by one and in groups, and questions to many receipts.

    python bench/ledger.py                 1,000,000 receipts in a temporary folder, about 3 GB
    python bench/ledger.py --rows 100000

Prints one JSON document. Exits with 1 where a figure misses what the ledger promises: an append
returns within 1 ms, a sum by model takes under 1 s.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from leangen.ledger import Ledger
from leangen.records import Carbon, Energy, Host, Latency, MeterWindow, Receipt, Runtime, Units

GROUP = 2000
ONE_BY_ONE = 1000


def receipts(count: int) -> Iterator[Receipt]:
    """Receipts of 365 days, 20 models, 4 schemes and 10 tags; every tenth overlaps another."""
    draw = random.Random(0)
    begin_ns = 0
    for number in range(count):
        day = number * 365 // count
        duration_ns = draw.randrange(50_000_000, 2_000_000_000)
        begin_ns += duration_ns // 2 if number % 10 == 0 else 2_000_000_000
        gross_uj = duration_ns // 50
        window = MeterWindow(
            sensor="rapl:package-0",
            source="measured",
            energy_uj=gross_uj,
            u_random_j=0.01,
            u_systematic_j=gross_uj / 1e6 * 0.05,
            tick_s=0.001,
            coverage=1.0,
        )
        yield Receipt(
            id=f"{number:032x}",
            started_at=f"2025-{1 + day // 31:02d}-{1 + day % 28:02d}T08:00:00.000Z",
            duration_ns=duration_ns,
            host=Host(id="0123456789abcdef", boot_id="b" * 32, device="cpu"),
            model=f"model-{number % 20}",
            scheme=("fp32", "int8", "int4", "nf4")[number % 4],
            bundle="sha256:" + "0" * 64,
            family="language",
            request={"max_new_tokens": 64, "temperature": 0.0, "seed": number},
            units=Units(kind="token", count=64, prompt=12),
            energy=Energy(
                source="measured",
                scope=("package-0",),
                reason=None,
                gross_uj=gross_uj,
                u_random_j=0.01,
                u_systematic_j=gross_uj / 1e6 * 0.05,
                u_j=0.1,
                meters=(window,),
            ),
            latency=Latency(
                total_s=duration_ns / 1e9, ttft_s=0.04, step_p50_s=0.007, step_p95_s=0.009
            ),
            carbon=Carbon(
                g=gross_uj / 1e6 / 3.6e6 * 473,
                intensity_g_per_kwh=473,
                region="world",
                year=2024,
                source="Ember via OWID",
            ),
            peak_rss_bytes=300_000_000,
            runtime=Runtime(provider="CPUExecutionProvider", threads=2, kernels="avx2"),
            tag=None if number % 3 else f"tag-{number % 10}",
            begin_boottime_ns=begin_ns,
        )


def timed_s(call: Callable[[], Any]) -> float:
    """Seconds that a call takes."""
    start_ns = time.monotonic_ns()
    call()
    return (time.monotonic_ns() - start_ns) / 1e9


def median_s(call: Callable[[], Any], repeats: int = 5) -> float:
    """Median of the seconds that a call takes."""
    return statistics.median(timed_s(call) for _ in range(repeats))


def measure(path: Path, rows: int) -> dict[str, float]:
    """Fill the ledger and time what is asked of it."""
    with Ledger(path) as ledger:
        source = receipts(rows)
        fill_s = 0.0
        in_groups = itertools.islice(source, max(rows - ONE_BY_ONE, 0))
        while group := list(itertools.islice(in_groups, GROUP)):
            start_ns = time.monotonic_ns()
            for receipt in group:
                ledger.append(receipt)
            ledger.flush()
            fill_s += (time.monotonic_ns() - start_ns) / 1e9
        appends, acknowledged = [], []
        for receipt in source:  # the last ones one by one, as an engine does
            start_ns = time.monotonic_ns()
            ticket = ledger.append(receipt)
            queued_ns = time.monotonic_ns()
            ticket.wait()
            appends.append((queued_ns - start_ns) / 1e6)
            acknowledged.append((time.monotonic_ns() - start_ns) / 1e6)
        figures = {
            "rows": sum(row.receipts for row in ledger.summary(by=())),
            "in_groups_per_s": (rows - len(appends)) / fill_s,
        }
        for name, values in (("append", appends), ("acknowledged", acknowledged)):
            if values:
                figures[f"{name}_ms_median"] = statistics.median(values)
                figures[f"{name}_ms_p99"] = sorted(values)[int(len(values) * 0.99)]
        figures |= {
            "sum_by_model_s": median_s(lambda: ledger.summary(by=("model",))),
            "sum_by_day_and_tag_s": median_s(lambda: ledger.summary(by=("day", "tag"))),
            "sum_of_one_tag_s": median_s(lambda: ledger.summary(where={"tag": "tag-3"})),
            "last_ten_s": median_s(lambda: ledger.entries(limit=10)),
            "verify_s": timed_s(ledger.verify),
        }
    with Ledger(path) as ledger:
        figures["first_sum_after_opening_s"] = timed_s(lambda: ledger.summary(by=("model",)))
    figures["bytes_per_row"] = path.stat().st_size / rows
    return figures


def main() -> int:
    """Measure, print, judge."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--folder", type=Path, help="where the ledger is made; default: temporary")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.folder) as folder:
        figures = measure(Path(folder) / "ledger.sqlite", args.rows)
    print(json.dumps({name: float(f"{value:.4g}") for name, value in figures.items()}, indent=1))
    return int(figures["append_ms_median"] > 1 or figures["sum_by_model_s"] > 1)


if __name__ == "__main__":
    sys.exit(main())
