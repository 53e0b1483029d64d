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
        "62c2d1a9c6112038e90f8b4aaf8a74e48472f0f543a1cf46ebd1a811018b5832",
        1_420_000,
    ),
    _flow(
        "fashion-glow",
        "Glow of 0.8M parameters over clothes at 28 x 28",
        "66f7ffacd51b9929c85288ff857c5f6864bf5acacb233a5eec606943da0deaec",
        1_528_588,
    ),
    _flow(
        "fashion-maf",
        "masked autoregressive flow of 1.2M parameters over clothes at 28 x 28",
        "15d553ad452285a1ed95a44a5fbfb3fae50cc80de46b7f44d7380c69dcade33a",
        1_595_148,
    ),
    _flow(
        "galaxy-nsf",
        "autoregressive neural spline flow over 7 galaxy properties",
        "ffd5a625f53ce1ea48acf0cee415db7202db31ba66a1b4ca42b5fa0150ef0b60",
        111_372,
    ),
)
