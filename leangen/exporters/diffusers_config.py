"""The config of a bundle made from a diffusers pipeline: all that running it needs to know."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from leangen.bundle import Draft
from leangen.errors import DependencyError, SourceError, UnsupportedError
from leangen.exporters import diffusers_schedulers as schedulers
from leangen.exporters.diffusers_pipelines import Upscale

if TYPE_CHECKING:
    from leangen.exporters.diffusers_components import Form
    from leangen.exporters.diffusers_saved import Saved

_FEWER_STEPS = {"lcm": 4, "consistency": 1}
"""Steps of models that were distilled to take few, by their sampler."""


def describe(
    saved: Saved, written: Mapping[str, Mapping[str, Form]], draft: Draft
) -> dict[str, Any]:
    """The config of `families.diffusion`; writes the tokenizers into the draft's folder."""
    pipeline = saved.pipeline
    form = written[pipeline.denoiser]["model"]
    scheduler = saved.config("scheduler")
    found = schedulers.describe(scheduler or schedulers.PLAIN)
    if not scheduler:
        found["reasons"]["noise_level"] = "saved without a scheduler: taken to be DDPM's"
    shape = list(form.inputs["sample"].shape)
    found["noise_level"] |= {"shape": [1], "dtype": "float32"}
    steps, guidance = _defaults(saved, scheduler, found["sampler"])
    image_shape = _image_shape(written, shape)
    config: dict[str, Any] = {
        "sample": {"input": "sample", "output": "prediction", "shape": shape},
        **found,
        "steps": steps,
        "guidance": guidance,
        "conditions": _conditions(saved, form, image_shape),
        "image_shape": image_shape,
        "range": [-1.0, 1.0],
        "render": None,
    }
    if "guidance" in form.inputs:
        config["guidance_input"] = "guidance"
    if pipeline.texts:
        config["text"] = _text(saved, draft)
    if pipeline.upscale is not None:
        config["upscale"] = _upscale(saved, pipeline.upscale, form)
    elif "masked_image" in form.inputs:
        config["inpainting"] = {"mask": "mask", "image": "masked_image"}
    fed = {"sample", found["noise_level"]["input"], "guidance", "image", "mask", "masked_image"}
    if unfed := form.inputs.keys() - fed - config["conditions"].keys() - pipeline.feeds.keys():
        raise UnsupportedError(
            f"{pipeline.denoiser} of {saved.path} takes {', '.join(sorted(unfed))}, which a "
            f"{saved.kind} does not give it: its config.json is of another kind of pipeline"
        )
    return config


def _defaults(saved: Saved, scheduler: Mapping[str, Any], sampler: str) -> tuple[int, float | None]:
    """Steps and guidance: the pipeline's own, but for models distilled to take few steps."""
    pipeline = saved.pipeline
    if (
        scheduler.get("_class_name") == "EulerAncestralDiscreteScheduler"
        and scheduler.get("timestep_spacing") == "trailing"
    ):
        return 1, None  # SD Turbo and SDXL Turbo (arXiv 2311.17042)
    return _FEWER_STEPS.get(sampler, pipeline.steps), pipeline.guidance


def _image_shape(written: Mapping[str, Mapping[str, Form]], shape: list[int]) -> list[int]:
    """[c, h, w] of the pictures that samples are decoded to."""
    decoder = written.get("vae", {}).get("decoder")
    if decoder is None:
        return shape
    latent, image = decoder.inputs["latent"], written["vae"]["encoder"].inputs["image"]
    factor = image.shape[1] // latent.shape[1]
    return [image.shape[0], shape[1] * factor, shape[2] * factor]


def _conditions(saved: Saved, form: Form, image_shape: list[int]) -> dict[str, Any]:
    """What of the denoiser's inputs a request sets by name."""
    size = [float(side) for side in image_shape[1:]]
    known: dict[str, dict[str, Any]] = {
        "original_size": {"default": size, "min": 0, "max": None},
        "crop": {"default": [0.0, 0.0], "min": 0, "max": None},
        "target_size": {"default": size, "min": 0, "max": None},
        "resolution": {"default": size, "min": 0, "max": None},
        "aspect_ratio": {"default": size[0] / size[1], "min": 0, "max": None},
    }
    conditions = {
        name: entry | {"shape": [1, *form.inputs[name].shape], "dtype": "float32"}
        for name, entry in known.items()
        if name in form.inputs
    }
    for name in ("class", "noise_level"):
        if name in form.inputs:
            conditions[name] = _classes(saved, name, form.inputs[name].high)
    return conditions


def _classes(saved: Saved, name: str, count: int) -> dict[str, Any]:
    entry: dict[str, Any] = {"min": 0, "max": count - 1, "default": 0}
    if name == "noise_level" and saved.pipeline.upscale is not None:
        most = min(count - 1, int(saved.index.get("max_noise_level", count - 1)))
        entry |= {"max": most, "default": min(saved.pipeline.upscale.noise_level, most)}
    if saved.kind == "DiTPipeline":
        entry |= {"max": count - 2, "unconditional": count - 1}
        names = saved.index.get("id2label") or {}
        entry["names"] = {
            word.strip(): int(number)
            for number, label in names.items()
            for word in str(label).split(",")
        }
    return entry | {"shape": [1], "dtype": "int64"}


def _upscale(saved: Saved, upscale: Upscale, form: Form) -> dict[str, Any]:
    shape = list(form.inputs["image"].shape)
    if upscale.resize:
        shape = [shape[0], shape[1] // 4, shape[2] // 4]
    noise = {
        "condition": "noise_level",
        "schedule": schedulers.schedule(saved.config(upscale.scheduler)),
    }
    return {"input": "image", "shape": shape, "resize": upscale.resize, "noise": noise}


def _text(saved: Saved, draft: Draft) -> dict[str, Any]:
    encoders = {}
    for role, text in saved.pipeline.texts.items():
        file = f"{role}.tokenizer.json"
        pad = _tokenizer(saved, text.tokenizer, draft.folder / file)
        encoders[role] = {
            "tokenizer": file,
            "length": text.length,
            "pad": pad,
            "masked": text.masked,
        }
    zeros = saved.index.get("force_zeros_for_empty_prompt")
    return {
        "encoders": encoders,
        "feeds": {name: [list(row) for row in rows] for name, rows in saved.pipeline.feeds.items()},
        "empty": "zeros" if zeros else None,
        "lowercase": saved.pipeline.lowercase,
    }


def _tokenizer(saved: Saved, name: str, target: Any) -> int:
    """Write a component's tokenizer in the form of `tokenizers`; its padding token."""
    import transformers

    kind = str((saved.index.get(name) or [None, None])[1])
    try:
        tokenizer = getattr(transformers, kind).from_pretrained(saved.path / name)
        backend = tokenizer.backend_tokenizer
    except ImportError as error:
        raise DependencyError(
            f"{name} of {saved.path} is stored in a form that needs another package: "
            f"{str(error).strip().splitlines()[0]}"
        ) from error
    except (AttributeError, OSError, ValueError, TypeError) as error:
        raise SourceError(
            f"{saved.path / name} holds no tokenizer that transformers reads ({error}): save it "
            "there with save_pretrained"
        ) from error
    target.write_text(backend.to_str(), encoding="utf-8")
    return int(tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0)
