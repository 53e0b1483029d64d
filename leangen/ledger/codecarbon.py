"""codecarbon's `emissions.csv`: energies in kWh, emissions in kgCO2e, powers in watts.

Its columns do not say how a figure was got. RAM is always modelled, CPU often (a constant share of
the processor's rated power), GPU is read from the driver. So a row is taken as an estimate, with
the 60% that leangen gives an estimate, unless all of it is GPU energy. It writes 0 where it
measured nothing, so a 0 is taken as unknown.

Columns as of codecarbon 3.3.2, https://github.com/mlco2/codecarbon (output_methods).
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from datetime import datetime, timedelta
from typing import Any

from leangen.records import (
    Carbon,
    Energy,
    Host,
    Latency,
    MeterWindow,
    Receipt,
    Runtime,
    Source,
    Units,
)

COLUMNS = (
    *("timestamp", "project_name", "run_id", "experiment_id", "duration", "emissions"),
    *("emissions_rate", "cpu_power", "gpu_power", "ram_power", "cpu_energy", "gpu_energy"),
    *("ram_energy", "energy_consumed", "water_consumed", "country_name", "country_iso_code"),
    *("region", "cloud_provider", "cloud_region", "os", "python_version", "codecarbon_version"),
    *("cpu_count", "cpu_model", "gpu_count", "gpu_model", "longitude", "latitude"),
    *("ram_total_size", "tracking_mode", "cpu_utilization_percent", "gpu_utilization_percent"),
    *("ram_utilization_percent", "ram_used_gb", "on_cloud", "pue", "wue"),
)
NEEDED = {"timestamp", "duration", "emissions", "energy_consumed"}
"""In every version; older ones lack many of the others."""
J_PER_KWH = 3.6e6
ESTIMATE_U = 0.6
PARTS = ("cpu", "gpu", "ram")


def row_of(receipt: dict[str, Any]) -> dict[str, Any]:
    """A receipt as codecarbon's columns; what is unknown stays empty, never 0."""
    energy, carbon = receipt["energy"], receipt["carbon"]
    duration_s = receipt["duration_ns"] / 1e9
    started = datetime.fromisoformat(receipt["started_at"])
    versions = receipt["runtime"]["versions"]
    row: dict[str, Any] = {
        "timestamp": f"{started + timedelta(seconds=duration_s):%Y-%m-%dT%H:%M:%S}",
        "project_name": f"{receipt['model']}:{receipt['scheme']}",
        "run_id": receipt["id"],
        "experiment_id": receipt["tag"],
        "duration": duration_s,
        "emissions": None if carbon["g"] is None else carbon["g"] / 1000,
        "energy_consumed": _kwh(energy["gross_j"]),
        "region": carbon["region"],
        "python_version": versions.get("python"),
        "tracking_mode": "process" if energy["source"] == "estimated" else "machine",
        "on_cloud": "N",
        "pue": 1.0,
    }
    if carbon["g"] is not None and duration_s:
        row["emissions_rate"] = row["emissions"] / duration_s
    for part, energy_j in _parts(receipt).items():
        row[f"{part}_energy"] = _kwh(energy_j)
        row[f"{part}_power"] = energy_j / duration_s if duration_s else None
    return row


def _kwh(energy_j: float | None) -> float | None:
    return None if energy_j is None else energy_j / J_PER_KWH


def _parts(receipt: dict[str, Any]) -> dict[str, float]:
    """Joules by codecarbon's parts, as far as the domains tell: GPUs, memory, the rest is CPU."""
    energy = receipt["energy"]
    parts: dict[str, float] = {}
    if energy["gross_j"] is not None:
        for scope, meter in zip(energy["scope"], energy["meters"], strict=False):
            part = "gpu" if "gpu" in scope else "ram" if "dram" in scope else "cpu"
            parts[part] = parts.get(part, 0.0) + meter["joules"]
    return parts


def receipt_of(row: dict[str, str]) -> dict[str, Any]:
    """One row as a receipt's JSON. Raises ValueError for a row that cannot be read."""
    duration_s = _number(row, "duration") or 0.0
    gross_j = (_number(row, "energy_consumed") or 0.0) * J_PER_KWH or None
    kg = _number(row, "emissions")
    version = f"codecarbon {row.get('codecarbon_version') or '(version unknown)'}"
    parts = {part: _number(row, f"{part}_energy") or 0.0 for part in PARTS}
    source, reason = _source(parts, gross_j, version)
    written = _time(row["timestamp"])
    started = written - timedelta(seconds=duration_s)
    gross_uj = None if gross_j is None else round(gross_j * 1e6)
    u_j = ESTIMATE_U * gross_j if gross_j is not None and source == "estimated" else None
    meter = MeterWindow(sensor="codecarbon", source=source, energy_uj=gross_uj, u_systematic_j=u_j)
    receipt = Receipt(
        id=_id(row),
        started_at=f"{started:%Y-%m-%dT%H:%M:%S}.{started.microsecond // 1000:03d}Z",
        duration_ns=round(duration_s * 1e9),
        host=Host(id="codecarbon", boot_id="unknown", device="gpu" if parts["gpu"] else "cpu"),
        model=row.get("project_name") or "codecarbon",
        scheme="unknown",
        bundle="unknown",
        family="unknown",
        request={},
        units=Units(kind="run", count=1),
        energy=Energy(
            source=source,
            scope=("codecarbon",) if gross_j is not None else (),
            reason=reason,
            gross_uj=gross_uj,
            u_random_j=None if u_j is None else 0.0,
            u_systematic_j=u_j,
            u_j=u_j,
            per_unit_j=gross_j,
            per_unit_u_j=u_j,
            meters=(meter,) if gross_j is not None else (),
        ),
        latency=Latency(total_s=duration_s, ttft_s=None, step_p50_s=None, step_p95_s=None),
        carbon=Carbon(
            g=None if gross_j is None or kg is None else kg * 1000,
            intensity_g_per_kwh=kg * 1000 / (gross_j / J_PER_KWH) if gross_j and kg else 0.0,
            region=row.get("region") or row.get("country_iso_code") or "unknown",
            year=written.year,
            source=version,
        ),
        peak_rss_bytes=0,
        runtime=Runtime(
            provider="unknown",
            threads=0,
            kernels="unknown",
            reasons={"runtime": f"imported from {version}"},
            versions={"python": row["python_version"]} if row.get("python_version") else {},
        ),
        tag=row.get("experiment_id") or None,
    )
    document = receipt.to_json()
    document["memory"]["peak_rss_bytes"] = document["runtime"]["threads"] = None
    if not (gross_j and kg):
        document["carbon"]["intensity_g_per_kwh"] = None
    return document


def _source(parts: dict[str, float], gross_j: float | None, version: str) -> tuple[Source, str]:
    if gross_j is None:
        return (
            "unavailable",
            f"{version} wrote no energy, or 0, as it does when it measured nothing",
        )
    if parts["gpu"] and not parts["cpu"] and not parts["ram"]:
        return "measured", f"GPU energy that {version} read; its file gives no uncertainty"
    return "estimated", (
        f"{version}: its file does not say which parts were read and which were modelled; "
        f"u is {ESTIMATE_U:.0%}"
    )


def _id(row: dict[str, str]) -> str:
    """The run's id where it is a receipt's, else a digest of the row: a run may have several."""
    run = row.get("run_id") or ""
    if re.fullmatch(r"[0-9a-f]{32}", run):
        return run
    return hashlib.sha256(json.dumps(row, sort_keys=True).encode()).hexdigest()[:32]


def _time(text: str) -> datetime:
    try:
        return datetime.fromisoformat(text).replace(tzinfo=None)
    except (TypeError, ValueError):
        raise ValueError(f"timestamp {text!r} is no ISO 8601 time") from None


def _number(row: dict[str, str], name: str) -> float | None:
    text = row.get(name)
    if not text:
        return None
    try:
        value = float(text)
    except ValueError:
        raise ValueError(f"{name} {text!r} is no number") from None
    if not math.isfinite(value) or value < 0:
        raise ValueError(f"{name} {text!r} is no finite number of 0 or more")
    return value
