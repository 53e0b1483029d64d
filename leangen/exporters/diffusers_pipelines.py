"""The pipelines of diffusers that leangen exports, by class: what each is made of."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

Rows = Mapping[str, Sequence[Sequence[str]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Text:
    """A text encoder of a pipeline."""

    tokenizer: str = "tokenizer"
    layer: int = -1
    """Which hidden states are wanted: -1 the last, normalized."""
    pooled: bool = False
    masked: bool = False
    """Whether it sees which tokens are padding."""
    length: int = 77
    """Tokens of a prompt, filled up and cut off."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Upscale:
    """A small image that is enlarged."""

    scheduler: str
    """The component with the noise that is added to it."""
    noise_level: int
    resize: str | None = None
    """How it gets the sample's size, if not by having it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Pipeline:
    """A kind of pipeline."""

    steps: int
    guidance: float | None = None
    denoiser: str = "unet"
    latent: bool = False
    """Whether it works on the latents of its component `vae`."""
    texts: Mapping[str, Text] = field(default_factory=dict)
    """Text encoders, by component, and graph, name."""
    feeds: Rows = field(default_factory=dict)
    """What the denoiser is fed of them: see `families.prompting`."""
    lowercase: bool = False
    upscale: Upscale | None = None


_DENOISED = "text_encoder.hidden"
_STABLE = Pipeline(
    steps=50,
    guidance=7.5,
    latent=True,
    texts={"text_encoder": Text()},
    feeds={"text": [[_DENOISED]]},
)
_XL = replace(
    _STABLE,
    guidance=5.0,
    texts={
        "text_encoder": Text(layer=-2),
        "text_encoder_2": Text(tokenizer="tokenizer_2", layer=-2, pooled=True),
    },
    feeds={
        "text": [[_DENOISED, "text_encoder_2.hidden"]],
        "pooled": [["text_encoder_2.pooled"]],
    },
)
_SD3 = Pipeline(
    steps=28,
    guidance=7.0,
    denoiser="transformer",
    latent=True,
    texts={
        "text_encoder": Text(layer=-2, pooled=True),
        "text_encoder_2": Text(tokenizer="tokenizer_2", layer=-2, pooled=True),
        "text_encoder_3": Text(tokenizer="tokenizer_3", length=256),
    },
    feeds={
        "text": [[_DENOISED, "text_encoder_2.hidden"], ["text_encoder_3.hidden"]],
        "pooled": [["text_encoder.pooled", "text_encoder_2.pooled"]],
    },
)
_PIXART = Pipeline(
    steps=20,
    guidance=4.5,
    denoiser="transformer",
    latent=True,
    texts={"text_encoder": Text(masked=True, length=120)},
    feeds={"text": [[_DENOISED]], "text_mask": [["text_encoder.mask"]]},
    lowercase=True,
)
_IF = Pipeline(
    steps=100,
    guidance=7.0,
    texts={"text_encoder": Text(masked=True)},
    feeds={"text": [[_DENOISED]]},
    lowercase=True,
)

PIPELINES: Mapping[str, Pipeline] = {
    "ConsistencyModelPipeline": Pipeline(steps=1),
    "DDIMPipeline": Pipeline(steps=50),
    "DDPMPipeline": Pipeline(steps=1000),
    "DiTPipeline": Pipeline(steps=50, guidance=4.0, denoiser="transformer", latent=True),
    "IFPipeline": _IF,
    "IFSuperResolutionPipeline": replace(
        _IF,
        steps=50,
        guidance=4.0,
        upscale=Upscale(scheduler="image_noising_scheduler", noise_level=250, resize="bilinear"),
    ),
    "LatentConsistencyModelImg2ImgPipeline": replace(_STABLE, steps=4, guidance=8.5),
    "LatentConsistencyModelPipeline": replace(_STABLE, steps=4, guidance=8.5),
    "PixArtAlphaPipeline": _PIXART,
    "PixArtSigmaPipeline": replace(
        _PIXART, texts={"text_encoder": Text(masked=True, length=300)}
    ),
    "StableDiffusion3Img2ImgPipeline": _SD3,
    "StableDiffusion3InpaintPipeline": _SD3,
    "StableDiffusion3Pipeline": _SD3,
    "StableDiffusionImg2ImgPipeline": _STABLE,
    "StableDiffusionInpaintPipeline": _STABLE,
    "StableDiffusionPipeline": _STABLE,
    "StableDiffusionUpscalePipeline": replace(
        _STABLE, steps=75, guidance=9.0,
        upscale=Upscale(scheduler="low_res_scheduler", noise_level=20),
    ),
    "StableDiffusionXLImg2ImgPipeline": _XL,
    "StableDiffusionXLInpaintPipeline": _XL,
    "StableDiffusionXLPipeline": _XL,
}  # fmt: skip
"""Pipelines by their class; image-to-image and inpainting share what they are made of."""

BARE: Mapping[str, Pipeline] = {"UNet2DModel": Pipeline(steps=1000)}
"""Components that are a model on their own."""
