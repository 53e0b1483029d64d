"""Normalizing flows that bench/train made, in the distribution leangen-zoo."""

from __future__ import annotations

from leangen.catalog.sources import Entry, Packaged

_CLOTHES = "MIT (weights; data Fashion-MNIST, MIT)"
_GALAXIES = "MIT (weights; data of pzflow, MIT)"


def _flow(name: str, summary: str, sha256: str, size_bytes: int) -> Entry:
    clothes = name.startswith("fashion-")
    script = "fashion_flows" if clothes else "tabular_flows"
    return Entry(
        name=name,
        family="flow",
        summary=f"{summary}; bench/train/{script}.py",
        source=Packaged(
            filename=f"{name}.tar.xz",
            sha256=sha256,
            size_bytes=size_bytes,
            licence=_CLOTHES if clothes else _GALAXIES,
            distribution="leangen-zoo",
        ),
        exporter="packed",
        forms={"fp32": {}},
    )


ENTRIES = (
    _flow(
        "fashion-realnvp",
        "RealNVP of 0.7M parameters over clothes at 28 x 28",
        "0d19cd4d2f7c2ac83ed02f5c61db0221ba98d0fbb310771c17783de7601db112",
        1_419_952,
    ),
    _flow(
        "fashion-glow",
        "Glow of 0.8M parameters over clothes at 28 x 28",
        "f8c4e23cb5779f6dde06a0e2a0f2efc317440aa15f75ed8a2c79d8e495a3598d",
        1_530_888,
    ),
    _flow(
        "fashion-nsf",
        "neural spline flow of 0.8M parameters over clothes at 28 x 28",
        "a0f932c9ef44b86a4b60d45d31f8cb9a70a72564e12929d149fd9ba7a0778b44",
        1_561_708,
    ),
    _flow(
        "fashion-maf",
        "masked autoregressive flow of 1.2M parameters over clothes at 28 x 28",
        "8db9870a3fd891896053063f15956f25cbe838fe1c8ae8937660057947d1b068",
        1_593_956,
    ),
    _flow(
        "galaxy-realnvp",
        "RealNVP over 7 galaxy properties",
        "a6441a4938dad372adaf249c0c044e84fe6b7d003432159ac11b37373fffb952",
        280_460,
    ),
    _flow(
        "galaxy-maf",
        "masked autoregressive flow over 7 galaxy properties",
        "76735dc25994a1f7b4551a3ae68e5859875df15990641c750d5cf3fc33fa16db",
        172_528,
    ),
    _flow(
        "galaxy-nsf",
        "autoregressive neural spline flow over 7 galaxy properties",
        "d0d8ec4c27b440693c1cd20b0c08c3527dc0700be8de05b8be9d216abf96b094",
        111_228,
    ),
)
