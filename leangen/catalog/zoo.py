"""Models that bench/train made, in leangen's own package or in the distribution leangen-zoo."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leangen.catalog.sources import Entry, Packaged, gguf_forms

CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
FASHION_DDPM: Mapping[str, Any] = {
    "family": "diffusion",
    "prediction": "v",
    "schedule": {"kind": "cosine", "timesteps": 1000},
    "sampler": "dpmpp_2m",
    "steps": 20,
    "guidance": 2.0,
    "conditions": {
        "label": {
            "min": 0,
            "max": 9,
            "default": 9,
            "unconditional": 10,
            "names": {name: label for label, name in enumerate(CLOTHES)},
        }
    },
    "range": [-1.0, 1.0],
}
"""How the denoisers of bench/train/fashion_ddpm.py were trained, and are best drawn from."""

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
    Entry(
        name="fashion-ddpm",
        family="diffusion",
        summary="UNet of 0.5M parameters, clothes at 28 x 28 by label; bench/train/fashion_ddpm.py",
        source=Packaged(
            filename="fashion-ddpm.onnx.xz",
            sha256="213b429b7d9babaea0ccbe9524087535f2eb5adb94d2c19cffbd0db332f4ab02",
            size_bytes=915_336,
            licence="MIT (weights; data Fashion-MNIST, MIT)",
        ),
        exporter="onnx",
        forms={"fp32": FASHION_DDPM},
    ),
)
