"""Models that bench/train made, in leangen's own package or in the distribution leangen-zoo."""

from __future__ import annotations

from leangen.catalog.sources import Entry, Packaged, gguf_forms

ENTRIES = (
    Entry(
        name="smiles-lm",
        family="language",
        summary="molecules as SMILES, 5.6M parameters, trained by bench/train/smiles_lm.py",
        source=Packaged(
            filename="smiles-lm.gguf.xz",
            sha256="76f04bb5150bfc4c808b2e156cc5a6443814036a8c7fb5346944dedc754c7811",
            size_bytes=10_161_052,
            licence="MIT (weights; data MOSES, MIT)",
        ),
        exporter="gguf",
        **gguf_forms("F16"),
    ),
)
