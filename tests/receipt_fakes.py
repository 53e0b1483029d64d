"""Made-up receipts for tests of what is shown of a ledger."""

from __future__ import annotations

from leangen.records import (
    Carbon,
    Energy,
    Host,
    Latency,
    MeterWindow,
    Receipt,
    Runtime,
    StepEnergy,
    Units,
)


def receipt(
    name,
    *,
    model="smollm2-135m",
    scheme="int4",
    family="language",
    day="2026-11-21",
    unit="token",
    units=64.0,
    duration_s=0.5,
    source="measured",
    gross_j=4.1,
    u_random_j=0.05,
    u_systematic_j=0.2,
    idle_j=None,
    tag=None,
    sensor="rapl:package-0",
    **changes,
):
    """A receipt of one generation; `gross_j=None` is one without a figure."""
    known = gross_j is not None
    source = source if known else "unavailable"
    gross_uj = round(gross_j * 1e6) if known else None
    fields = {
        "id": name,
        "started_at": f"{day}T08:00:00.123Z",
        "duration_ns": round(duration_s * 1e9),
        "host": Host(id="h1", boot_id="b1", device="cpu"),
        "model": model,
        "scheme": scheme,
        "bundle": "sha256:00",
        "family": family,
        "request": {"max_new_tokens": 64, "temperature": 0.0, "seed": 7, "stop": ["."]},
        "units": Units(kind=unit, count=units, prompt=12),
        "energy": Energy(
            source=source,
            scope=("package-0",) if known else (),
            reason=None if source == "measured" else f"why it is {source} <here>",
            gross_uj=gross_uj,
            u_random_j=u_random_j if known else None,
            u_systematic_j=u_systematic_j if known else None,
            u_j=(u_random_j**2 + u_systematic_j**2) ** 0.5 if known else None,
            idle_uj=None if idle_j is None else round(idle_j * 1e6),
            idle_u_j=None if idle_j is None else 0.1 * idle_j,
            meters=(MeterWindow(sensor=sensor, source=source, energy_uj=gross_uj),)
            if known
            else (),
            steps=(StepEnergy(kind="decode", energy_uj=gross_uj, u_j=0.2, method="shared"),)
            if known
            else (),
        ),
        "latency": Latency(total_s=duration_s, ttft_s=0.04, step_p50_s=0.007, step_p95_s=0.008),
        "carbon": Carbon(
            g=gross_j * 1e-4 if known else None,
            intensity_g_per_kwh=360,
            region="own",
            year=2026,
            source="given by the user",
        ),
        "peak_rss_bytes": 1,
        "runtime": Runtime(provider="CPUExecutionProvider", threads=2, kernels="ort"),
        "tag": tag,
        **changes,
    }
    return Receipt(**fields)
