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
DECODER: Mapping[str, Any] = {"family": "oneshot", "range": PIXELS}
GENERATOR: Mapping[str, Any] = {**DECODER, "conditions": {"label": LABEL}}


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
    _entry(
        "fashion-fm",
        "UNet of 0.5M parameters, flow matching, clothes by label",
        "fashion_flow_matching",
        BY_FLOW,
        sha256="4dfa8a8837956240f261fc8b0256d232d94918f45d6e779d12b0528597acf7c7",
        size_bytes=911_984,
    ),
    _entry(
        "fashion-dit",
        "diffusion transformer of 1.9M parameters, clothes by label",
        "fashion_dit",
        BY_LABEL,
        sha256="7dfea87600c7168925985ffb0f6329db081b94e21b02dbec6c0eaaee66f3f88d",
        size_bytes=3_528_728,
    ),
    _entry(
        "fashion-14",
        "UNet of 0.4M parameters, clothes at 14 x 14 by label",
        "fashion_cascade",
        BY_LABEL,
        sha256="e25216b3461381b6de07504adbe0e926f2bb8363fd4fe91fdf1c9a2ffa9708cf",
        size_bytes=706_712,
    ),
    _entry(
        "fashion-upscaler",
        "UNet of 0.5M parameters, enlarges those to 28 x 28",
        "fashion_cascade",
        UPSCALER,
        sha256="f38aeb1ad2d262c1bfbf35c59caf9c92c86793bcea6013f4252a4a036e926e2d",
        size_bytes=949_492,
    ),
    _entry(
        "fashion-latent",
        "denoiser of 0.6M parameters, latents of clothes by minilm-l6's vectors",
        "fashion_latent",
        BY_TEXT,
        sha256="9efd048f5b0767382427ca78d750a295585d7326a1d415a7b22bea81bc0996ce",
        size_bytes=1_203_004,
    ),
    _entry(
        "fashion-vae",
        "decoder of those latents, 0.2M parameters",
        "fashion_latent",
        DECODER,
        sha256="367416c83920c76947e4a972798b2c2b46cf04ec6b5b0f5b1d6d8b7162c1d2c3",
        size_bytes=361_408,
    ),
    _entry(
        "fashion-gan",
        "generator of 0.8M parameters, clothes by label in one step",
        "fashion_gan",
        GENERATOR,
        sha256="ce48de57b44d950e17a09e17c2b6abb9dc74a7a5be85200df0c1e325020f19c7",
        size_bytes=1_502_216,
    ),
)
