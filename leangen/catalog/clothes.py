"""Models of Fashion-MNIST's clothes, which bench/train made: denoisers, a decoder, a GAN."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from leangen.catalog.sources import Entry, Packaged

CLOTHES = (
    *("t-shirt", "trouser", "pullover", "dress", "coat"),
    *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
)
LABEL: Mapping[str, Any] = {
    "min": 0,
    "max": 9,
    "default": 9,
    "names": {name: label for label, name in enumerate(CLOTHES)},
}
COSINE: Mapping[str, Any] = {"kind": "cosine", "timesteps": 1000}
PIXELS = [-1.0, 1.0]
BY_LABEL: Mapping[str, Any] = {
    "family": "diffusion",
    "prediction": "v",
    "schedule": COSINE,
    "sampler": "dpmpp_2m",
    "steps": 20,
    "guidance": 2.0,
    "conditions": {"label": {**LABEL, "unconditional": 10}},
    "range": PIXELS,
}
"""How the denoisers that are told a label were trained, and are best drawn from."""
BY_FLOW = {key: value for key, value in BY_LABEL.items() if key != "schedule"} | {
    "prediction": "flow"
}
UPSCALER: Mapping[str, Any] = {
    **{key: BY_LABEL[key] for key in ("family", "prediction", "schedule", "sampler", "range")},
    "steps": 10,
    "upscale": {
        "input": "small",
        "shape": [1, 14, 14],
        "resize": True,
        "noise": {"condition": "augmentation", "schedule": COSINE},
    },
    "conditions": {"augmentation": {"min": 0, "max": 300, "default": 100}},
}
BY_TEXT: Mapping[str, Any] = {
    **{key: BY_LABEL[key] for key in ("family", "prediction", "schedule", "sampler", "steps")},
    "guidance": 2.0,
    "latents": True,
    # minilm-l6 puts out vectors of length 1; no text at all is zeros.
    "conditions": {
        "text": {"min": None, "max": None, "default": 0, "unconditional": 0, "length": 1.0}
    },
}


def _entry(
    name: str,
    summary: str,
    script: str,
    options: Mapping[str, Any],
    *,
    sha256: str,
    size_bytes: int,
    distribution: str = "leangen-zoo",
) -> Entry:
    return Entry(
        name=name,
        family=options["family"],
        summary=f"{summary}; bench/train/{script}.py",
        source=Packaged(
            filename=f"{name}.onnx.xz",
            sha256=sha256,
            size_bytes=size_bytes,
            licence="MIT (weights; data Fashion-MNIST, MIT)",
            distribution=distribution,
        ),
        exporter="onnx",
        forms={"fp32": options},
    )


ENTRIES = (
    _entry(
        "fashion-ddpm",
        "UNet of 0.5M parameters, clothes at 28 x 28 by label",
        "fashion_ddpm",
        BY_LABEL,
        sha256="213b429b7d9babaea0ccbe9524087535f2eb5adb94d2c19cffbd0db332f4ab02",
        size_bytes=915_336,
        distribution="leangen",
    ),
)
