"""Receipts for ledgers, made without running anything; imports no test framework."""

from __future__ import annotations

from leangen.records import Carbon, Energy, Host, Latency, MeterWindow, Receipt, Runtime, Units


def receipt(
    number=0,
    *,
    gross_uj=2_000_000,
    source="measured",
    scope=("package-0",),
    begin_ns=None,
    duration_ns=1_000_000_000,
    host="h1",
    boot_id="b1",
    **changes,
):
    share_uj = None if gross_uj is None else gross_uj // len(scope)
    energy = Energy(
        source=source,
        scope=scope,
        reason=None,
        gross_uj=gross_uj,
        u_random_j=None if gross_uj is None else 0.3,
        u_systematic_j=None if gross_uj is None else 0.1,
        meters=tuple(
            MeterWindow(sensor=f"rapl:{name}", source=source, energy_uj=share_uj) for name in scope
        ),
    )
    fields = {
        "id": f"r{number}",
        "started_at": "2026-11-21T08:00:00.123Z",
        "duration_ns": duration_ns,
        "host": Host(id=host, boot_id=boot_id, device="cpu"),
        "model": "smollm2-135m",
        "scheme": "int4",
        "bundle": "sha256:00",
        "family": "language",
        "request": {"seed": 0, "prompt": "naïve ☕"},
        "units": Units(kind="token", count=64),
        "energy": energy,
        "latency": Latency(total_s=1.0, ttft_s=None, step_p50_s=None, step_p95_s=None),
        "carbon": Carbon(
            g=None if gross_uj is None else gross_uj / 1e6 * 0.1,
            intensity_g_per_kwh=473,
            region="world",
            year=2024,
            source="Ember via OWID",
        ),
        "peak_rss_bytes": 1,
        "runtime": Runtime(provider="CPU", threads=2, kernels="ort"),
        "begin_boottime_ns": begin_ns,
        **changes,
    }
    return Receipt(**fields)
