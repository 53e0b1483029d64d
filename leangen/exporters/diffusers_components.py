"""The components of diffusers pipelines that leangen exports: which graphs each becomes.

A component has a function that describes its graphs: what goes in, what comes out, and how the
torch module is called for it. What a pipeline computes around a component (scaling of latents, size
embeddings, the half of an answer that is thrown away) is part of the graph, so that running one
needs to know none of it.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

BATCH = "batch"


@dataclass(frozen=True, slots=True)
class Input:
    """An input of a graph, by its shape without the batch."""

    shape: tuple[int, ...]
    high: int = 0
    """Whole numbers below this; 0 for floats."""
    dtype: torch.dtype = torch.float32
    traced: tuple[int, ...] | None = None
    """The shape to trace with, where height and width stay open."""

    def example(self, batch: int, *, full: bool, generator: torch.Generator) -> Tensor:
        """Random values, in the shape of use or of tracing."""
        shape = self.shape if full or self.traced is None else self.traced
        if self.high:
            drawn = torch.randint(self.high, (batch, *shape), generator=generator)
            return drawn.to(self.dtype)
        return torch.randn((batch, *shape), generator=generator)


@dataclass(frozen=True, slots=True)
class Form:
    """A graph made of a component."""

    call: Callable[..., Any]
    """call(component, **inputs) -> a tensor, or one for each output."""
    inputs: Mapping[str, Input]
    outputs: tuple[str, ...]
    open_outputs: bool = False
    """Whether height and width of the outputs follow those of the inputs."""

    def open_axes(self) -> dict[str, dict[int, str]]:
        """The axes that have no fixed size."""
        sized = {2: "height", 3: "width"}
        axes = {
            name: {0: BATCH} | (sized if each.traced is not None else {})
            for name, each in self.inputs.items()
        }
        return axes | {
            name: {0: BATCH} | ({2: "height_out", 3: "width_out"} if self.open_outputs else {})
            for name in self.outputs
        }


class Called(nn.Module):  # type: ignore[misc]
    """A component called as a form says, with its inputs in order."""

    def __init__(self, model: nn.Module, form: Form) -> None:
        super().__init__()
        self.model = model
        self.form = form

    def forward(self, *values: Tensor) -> Any:
        """The form's outputs."""
        return self.form.call(self.model, **dict(zip(self.form.inputs, values, strict=True)))


@dataclass(frozen=True, slots=True)
class Use:
    """What a pipeline does with its denoiser or a text encoder, beyond what all do."""

    beside: Mapping[str, int] = field(default_factory=dict)
    """Images that stand beside the sample as further channels: name -> channels."""
    sigma: Mapping[str, float] | None = None
    """The preconditioning of a consistency model, by `sigma_data` and `sigma_min`."""
    layer: int = -1
    """Which hidden states of a text encoder are wanted: -1 the last, normalized."""
    pooled: bool = False
    masked: bool = False
    """Whether a text encoder sees which tokens are padding."""
    length: int = 77


def denoiser_inputs(model: nn.Module, use: Use, *, sized: bool) -> dict[str, Input]:
    """The sample, what stands beside it, and the noise level."""
    config: Any = model.config
    channels = config.in_channels - sum(use.beside.values())
    size = config.sample_size
    height, width = size if isinstance(size, list | tuple) else (size, size)
    small = None
    if sized:
        small = (2 * 2 ** (len(config.block_out_channels) - 1),) * 2
    planes = {"sample": channels, **use.beside}
    inputs = {
        name: Input((count, height, width), traced=None if small is None else (count, *small))
        for name, count in planes.items()
    }
    level = "timestep" if use.sigma is None else "sigma"
    return inputs | {level: Input((), 999)}


def _joined(sample: Tensor, inputs: dict[str, Tensor], use: Use) -> Tensor:
    beside = [inputs.pop(name) for name in use.beside]
    return torch.cat([sample, *beside], 1) if beside else sample


def unet2d(model: nn.Module, use: Use) -> dict[str, Form]:
    """A pixel UNet, with classes or without (arXiv 2006.11239, 2010.02502, 2303.01469)."""
    config: Any = model.config
    inputs = denoiser_inputs(model, use, sized=True)
    if config.num_class_embeds:
        inputs["class"] = Input((), config.num_class_embeds, torch.int64)

    def answer(unet: Any, sample: Tensor, level: Tensor, given: dict[str, Tensor]) -> Tensor:
        prediction: Tensor = unet(
            sample, level, class_labels=given.get("class"), return_dict=False
        )[0]
        return prediction

    def call(unet: Any, sample: Tensor, timestep: Tensor, **given: Tensor) -> Tensor:
        return answer(unet, _joined(sample, given, use), timestep, given)

    def precondition(unet: Any, sample: Tensor, sigma: Tensor, **given: Tensor) -> Tensor:
        data, least = (use.sigma or {})["sigma_data"], (use.sigma or {})["sigma_min"]
        s = sigma[:, None, None, None]
        size = (s**2 + data**2) ** 0.5
        kept, taken = data**2 / ((s - least) ** 2 + data**2), (s - least) * data / size
        said = answer(unet, sample / size, 250 * torch.log(sigma + 1e-44), given)
        return taken * said + kept * sample

    form = call if use.sigma is None else precondition
    return {"model": Form(form, inputs, ("prediction",), open_outputs=True)}


def unet2d_condition(model: nn.Module, use: Use) -> dict[str, Form]:
    """A UNet that attends to text (arXiv 2112.10752; XL: 2307.01952; Imagen: 2205.11487)."""
    config: Any = model.config
    inputs = denoiser_inputs(model, use, sized=True)
    width = config.encoder_hid_dim or config.cross_attention_dim
    width = width if isinstance(width, int) else width[0]  # of each level, of one text
    inputs["text"] = Input((use.length, width))
    if config.num_class_embeds or config.class_embed_type == "timestep":
        name = "noise_level" if use.beside else "class"
        inputs[name] = Input((), config.num_class_embeds or 1000, torch.int64)
    if config.addition_embed_type == "text_time":
        sizes = 6 * config.addition_time_embed_dim
        inputs["pooled"] = Input((config.projection_class_embeddings_input_dim - sizes,))
        for name in ("original_size", "crop", "target_size"):
            inputs[name] = Input((2,), 1024)
    if config.time_cond_proj_dim is not None:
        inputs["guidance"] = Input((), 10)

    def call(unet: Any, sample: Tensor, timestep: Tensor, text: Tensor, **given: Tensor) -> Tensor:
        options: dict[str, Any] = {}
        sample = _joined(sample, given, use)
        for name in ("class", "noise_level"):
            if name in given:
                options["class_labels"] = given[name]
        if "pooled" in given:
            sizes = [given[name] for name in ("original_size", "crop", "target_size")]
            options["added_cond_kwargs"] = {
                "text_embeds": given["pooled"],
                "time_ids": torch.cat(sizes, 1),
            }
        if "guidance" in given:
            scale = given["guidance"]
            options["timestep_cond"] = _sinusoid(scale - 1, config.time_cond_proj_dim)
        prediction: Tensor = unet(sample, timestep, text, return_dict=False, **options)[0]
        return prediction[:, : config.in_channels - sum(use.beside.values())]

    return {"model": Form(call, inputs, ("prediction",), open_outputs=True)}


def _sinusoid(w: Tensor, width: int) -> Tensor:
    """The embedding of a guidance scale (arXiv 2310.04378)."""
    half = width // 2
    slow = torch.exp(torch.arange(half) * -(torch.log(torch.tensor(10000.0)) / (half - 1)))
    angles = 1000.0 * w[:, None] * slow[None]
    return torch.cat([torch.sin(angles), torch.cos(angles)], 1)


def dit(model: nn.Module, use: Use) -> dict[str, Form]:
    """A transformer on patches, conditioned on a class (arXiv 2212.09748)."""
    config: Any = model.config
    inputs = denoiser_inputs(model, use, sized=False)
    inputs["class"] = Input((), config.num_embeds_ada_norm + 1, torch.int64)

    def call(dit: Any, sample: Tensor, timestep: Tensor, **given: Tensor) -> Tensor:
        prediction: Tensor = dit(
            sample, timestep=timestep, class_labels=given["class"], return_dict=False
        )[0]
        return prediction[:, : config.in_channels]

    return {"model": Form(call, inputs, ("prediction",))}


def pixart(model: nn.Module, use: Use) -> dict[str, Form]:
    """A transformer on patches that attends to T5's text (arXiv 2310.00426)."""
    config: Any = model.config
    inputs = denoiser_inputs(model, use, sized=False)
    inputs["text"] = Input((use.length, config.caption_channels))
    inputs["text_mask"] = Input((use.length,), 2, torch.int64)
    sized = config.use_additional_conditions
    if sized or (sized is None and config.sample_size == 128):
        inputs["resolution"] = Input((2,), 1024)
        inputs["aspect_ratio"] = Input((1,), 2)

    def call(
        transformer: Any, sample: Tensor, timestep: Tensor, text: Tensor, **given: Tensor
    ) -> Tensor:
        sizes = {name: given.get(name) for name in ("resolution", "aspect_ratio")}
        prediction: Tensor = transformer(
            sample,
            text,
            timestep=timestep,
            encoder_attention_mask=given["text_mask"].to(sample.dtype),
            added_cond_kwargs=sizes,
            return_dict=False,
        )[0]
        return prediction[:, : config.in_channels]

    return {"model": Form(call, inputs, ("prediction",))}


def sd3(model: nn.Module, use: Use) -> dict[str, Form]:
    """A transformer on patches and text together, for flow matching (arXiv 2403.03206)."""
    config: Any = model.config
    inputs = denoiser_inputs(model, use, sized=False)
    inputs["text"] = Input((use.length, config.joint_attention_dim))
    inputs["pooled"] = Input((config.pooled_projection_dim,))

    def call(
        transformer: Any, sample: Tensor, timestep: Tensor, text: Tensor, pooled: Tensor
    ) -> Tensor:
        prediction: Tensor = transformer(sample, text, pooled, timestep, return_dict=False)[0]
        return prediction

    return {"model": Form(call, inputs, ("prediction",))}


def autoencoder(model: nn.Module, use: Use) -> dict[str, Form]:
    """A variational autoencoder: its decoder, and the mean of its encoder.

    The latents are those that the denoiser knows, shifted and scaled.
    """
    config: Any = model.config
    scale, shift = latent_scale(config)
    levels = 2 ** (len(_widths(config)) - 1)
    channels, size = config.latent_channels, _pair(config.get("sample_size") or 64 * levels)
    latent = Input((channels, size[0] // levels, size[1] // levels), traced=(channels, 4, 4))
    image = Input(
        (config.out_channels, *size), traced=(config.out_channels, 4 * levels, 4 * levels)
    )

    def decode(vae: Any, latent: Tensor) -> Tensor:
        decoded: Tensor = vae.decode(latent / scale + shift, return_dict=False)[0]
        return decoded

    def encode(vae: Any, image: Tensor) -> Tensor:
        found = vae.encode(image)
        mean = found.latents if hasattr(found, "latents") else found.latent_dist.mode()
        latent: Tensor = (mean - shift) * scale
        return latent

    return {
        "decoder": Form(decode, {"latent": latent}, ("image",), open_outputs=True),
        "encoder": Form(encode, {"image": image}, ("latent",), open_outputs=True),
    }


def latent_scale(config: Any) -> tuple[Any, Any]:
    """Latents are (mean - shift) * scale."""
    mean, std = config.get("latents_mean"), config.get("latents_std")
    scale = config.get("scaling_factor") or 1.0
    if mean is None or std is None:
        return scale, config.get("shift_factor") or 0.0
    mean, std = (torch.tensor(each).reshape(1, -1, 1, 1) for each in (mean, std))
    return scale / std, mean


def _widths(config: Any) -> Sequence[int]:
    widths: Sequence[int] = config.get("block_out_channels") or config.decoder_block_out_channels
    return widths


def _pair(size: Any) -> tuple[int, int]:
    return (size[0], size[1]) if isinstance(size, list | tuple) else (size, size)


def text_encoder(model: nn.Module, use: Use) -> dict[str, Form]:
    """CLIP's or T5's encoder of tokens: hidden states, and one vector of the whole text."""
    config: Any = model.config
    inputs = {"tokens": Input((use.length,), config.vocab_size, torch.int64)}
    if use.masked:
        inputs["mask"] = Input((use.length,), 2, torch.int64)

    def call(encoder: Any, tokens: Tensor, mask: Tensor | None = None) -> Any:
        said = encoder(
            tokens, attention_mask=mask, output_hidden_states=use.layer != -1, return_dict=True
        )
        hidden = said.last_hidden_state if use.layer == -1 else said.hidden_states[use.layer]
        if not use.pooled:
            return hidden
        return hidden, said.text_embeds if hasattr(said, "text_embeds") else said.pooler_output

    outputs = ("hidden", "pooled") if use.pooled else ("hidden",)
    return {"text_encoder": Form(call, inputs, outputs)}


FORMS: dict[str, Callable[[nn.Module, Use], dict[str, Form]]] = {
    "AutoencoderKL": autoencoder,
    "AutoencoderTiny": autoencoder,
    "CLIPTextModel": text_encoder,
    "CLIPTextModelWithProjection": text_encoder,
    "DiTTransformer2DModel": dit,
    "PixArtTransformer2DModel": pixart,
    "SD3Transformer2DModel": sd3,
    "T5EncoderModel": text_encoder,
    "UNet2DConditionModel": unet2d_condition,
    "UNet2DModel": unet2d,
}
"""What describes the graphs of a component, by its class in diffusers or transformers."""
