"""What an exported pipeline computes, beside what diffusers computes with torch."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from leangen.bundle import Bundle
from leangen.calibrate import Recorder
from leangen.errors import SourceError
from leangen.exporters.difference import Difference
from leangen.families import denoising, diffusion, latents
from leangen.session import Session

if TYPE_CHECKING:
    from leangen.exporters.diffusers_saved import Saved

STEPS = 4
_SEED = 7


@dataclass(frozen=True, slots=True)
class Component(Difference):
    """One result of the bundle against torch's, both in fp32, on one input."""

    part: str
    """The graph, or `trajectory` for whole pictures."""
    input: str
    """`random`, or `real`: what the pipeline feeds."""

    def __str__(self) -> str:
        return (
            f"{self.part} on {self.input} input differs from torch by at most {self.largest:.2g} "
            f"(the largest value is {self.scale:.3g})"
        )


def differences(saved: Saved, bundle: Bundle) -> list[Difference]:
    """Run each component, and the whole pipeline, with torch and from the bundle.

    Components on random input of the size of use and on what the pipeline feeds them; then a few
    steps of the whole with DDIM, or the model's own kind of schedule, from the same noise. Code
    that comes with a model is never run. Holds both models in memory.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of what diffusers would rather have in its configs
        return _differences(saved, bundle)


def _differences(saved: Saved, bundle: Bundle) -> list[Difference]:
    import diffusers
    import torch

    diffusers.utils.logging.set_verbosity_error()
    diffusers.utils.logging.disable_progress_bar()
    scheduler, changes = _scheduler(saved, bundle)
    recorder = Recorder(replace(bundle, config={**bundle.config, **changes}))
    request, noise, first = _asked(saved, recorder)
    *_, picture = diffusion.trajectory(recorder, request, rng=noise)
    if "encoder" in bundle.graphs:
        latents.encoded(recorder, np.clip(picture, -1, 1))
    real = recorder.feeds(1)
    found, parts = [], {}
    generator = torch.Generator().manual_seed(_SEED)
    for component in saved.components():
        module = parts[component.name] = component.load()
        for role, form in component.forms(module).items():
            random = {
                name: each.example(1, full=True, generator=generator).numpy()
                for name, each in form.inputs.items()
            }
            for kind, feeds in [("random", random), *(("real", feed) for feed in real[role])]:
                given = {name: torch.tensor(feeds[name]) for name in form.inputs}
                with torch.no_grad():
                    answer = form.call(module, **given)
                expected = answer if isinstance(answer, tuple) else (answer,)
                got = recorder.run(role, feeds, list(form.outputs))
                found.append(_difference(role, kind, got, [each.numpy() for each in expected]))
    if "shallow" in bundle.graphs:
        found.append(_shallow(recorder, real["model"][0]))
    theirs = _drawn(saved, parts, scheduler, recorder.bundle.config, request, first)
    return [*found, _difference("trajectory", "real", [np.clip(picture, -1, 1)], [theirs])]


def _difference(part: str, kind: str, got: list[Any], expected: list[Any]) -> Difference:
    largest = max(float(np.abs(a - b).max()) for a, b in zip(got, expected, strict=True))
    scale = max(float(np.abs(b).max()) for b in expected)
    return Component(part, kind, largest=largest, scale=scale)


def _shallow(session: Session, feeds: Mapping[str, Any]) -> Difference:
    """The outer part on the deep features of the same step, against the whole."""
    answer, deep = session.run("model", feeds, ["prediction", "deep"])
    taken = {each.name for each in session.graph("shallow").get_inputs()}
    given = {name: value for name, value in feeds.items() if name in taken} | {"deep": deep}
    return _difference("shallow", "real", session.run("shallow", given, ["prediction"]), [answer])


def _asked(saved: Saved, session: Session) -> tuple[diffusion.Request, _Noise, Any]:
    """A request, what draws its noise, and the first of that noise."""
    import diffusers
    import torch

    config = session.bundle.config
    request = diffusion.trial(session, _SEED)
    kind = diffusers.DDPMPipeline if saved.bare else getattr(diffusers, saved.kind)
    takes_latents = "latents" in inspect.signature(kind.__call__).parameters
    spread = denoising.pure_noise(config, denoising.levels(config, config["steps"])[0])
    shape = (1, *config["sample"]["shape"])
    first = torch.randn(shape, generator=torch.Generator().manual_seed(_SEED))
    return request, _Noise(first if takes_latents else None, spread), first * spread


def _drawn(
    saved: Saved,
    parts: dict[str, Any],
    scheduler: Any,
    config: Mapping[str, Any],
    request: diffusion.Request,
    first: Any,
) -> Any:
    """The pipeline's picture [1, c, h, w], -1 to 1, from latents that begin with `first`."""
    pipeline = _pipeline(saved, parts, scheduler)
    given = _arguments(config, request)
    given["latents"] = first / float(getattr(scheduler, "init_noise_sigma", 1.0))
    taken = inspect.signature(pipeline.__call__).parameters
    try:
        picture = pipeline(**{name: value for name, value in given.items() if name in taken})[0]
    except Exception as error:  # of torch, diffusers or transformers
        said = (str(error).splitlines() or [""])[0]
        raise SourceError(
            f"diffusers itself cannot draw with {saved.path} ({type(error).__name__}: {said}): "
            "there is nothing to compare with; leave --check out"
        ) from error
    return 2 * np.moveaxis(np.asarray(picture), -1, 1) - 1


class _Noise:
    """Draws what the pipeline draws, in the same order, from torch's generator."""

    def __init__(self, first: Any, spread: float) -> None:
        import torch

        self._first, self._spread = first, spread
        self._generator = torch.Generator().manual_seed(_SEED + 1)
        self._begun = False

    def standard_normal(self, shape: tuple[int, ...], dtype: Any) -> Any:
        """As NumPy's."""
        import torch

        begun, self._begun = self._begun, True
        if not begun and self._first is not None:
            return self._first.numpy().astype(dtype)
        drawn = torch.randn(shape, generator=self._generator).numpy().astype(dtype)
        # where the pipeline draws it, pure noise is not scaled to the first level's
        return drawn if begun else drawn / np.float32(self._spread)


def _scheduler(saved: Saved, bundle: Bundle) -> tuple[Any, dict[str, Any]]:
    """A scheduler of diffusers, and changes to the bundle's config for it to do the same."""
    import diffusers

    config = saved.config("scheduler")
    kind = config.get("_class_name", "DDPMScheduler")
    noise = bundle.config["noise_level"]
    if noise["kind"] == "sigma" or kind == "LCMScheduler":
        steps = bundle.config["steps"]
        return getattr(diffusers, kind).from_config(config), {"steps": steps}
    if noise["kind"] == "flow":
        own = diffusers.FlowMatchEulerDiscreteScheduler(shift=noise["shift"])
        noise = {**noise, "lowest": own.sigma_min}
        return own, {"steps": STEPS, "sampler": "euler", "noise_level": noise}
    ancestral = saved.bare or saved.kind in ("DDPMPipeline", *_LEARNED_VARIANCE)
    options = {"variance_type": "fixed_small"} if ancestral else {"set_alpha_to_one": True}
    clip = bundle.config["clip"] or {"quantile": None}
    kept = {key: value for key, value in config.items() if key in _KEPT}
    kept["clip_sample"] = "quantile" not in clip
    own = (diffusers.DDPMScheduler if ancestral else diffusers.DDIMScheduler)(
        **kept | options, timestep_spacing="leading", steps_offset=1
    )
    return own, {
        "steps": STEPS,
        "sampler": "ddpm" if ancestral else "ddim",
        "noise_level": {**noise, "spacing": "leading", "offset": 1, "inner": False},
    }


_LEARNED_VARIANCE = ("IFPipeline", "IFSuperResolutionPipeline")
_KEPT = (
    *("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "prediction_type"),
    *("thresholding", "dynamic_thresholding_ratio", "sample_max_value", "clip_sample_range"),
    "rescale_betas_zero_snr",
)
"""What of a scheduler is the model's and not the method's."""


def _pipeline(saved: Saved, parts: dict[str, Any], scheduler: Any) -> Any:
    import diffusers

    if saved.bare:
        return diffusers.DDPMPipeline(parts["unet"], scheduler)
    checker = {"safety_checker": None} if "safety_checker" in saved.index else {}
    if "vae" in parts and hasattr(parts["vae"], "quant_conv"):
        _take_the_mean(parts["vae"])
    pipeline = getattr(diffusers, saved.kind).from_pretrained(
        saved.path, **parts, **checker, scheduler=scheduler
    )
    pipeline.scheduler = scheduler  # some make one of their own kind of it
    pipeline.set_progress_bar_config(disable=True)
    return pipeline


def _take_the_mean(vae: Any) -> None:
    """Let an autoencoder draw latents without spread: bundles take the mean of what it encodes."""
    import torch

    convolution, latent = vae.quant_conv or vae.encoder.conv_out, vae.config.latent_channels
    with torch.no_grad():
        convolution.weight[latent:] = 0
        convolution.bias[latent:] = -30


def _arguments(config: Mapping[str, Any], request: diffusion.Request) -> dict[str, Any]:
    """A request as pipelines call its options; each takes some of them."""
    import torch

    steps = config["steps"]
    height, width = latents.image_shape(config)[1:]
    conditions = {
        name: request.conditions.get(name, entry["default"])
        for name, entry in config["conditions"].items()
    }
    given: dict[str, Any] = {
        "prompt": request.prompt,
        "num_inference_steps": steps,
        "guidance_scale": 1.0 if config["guidance"] is None else config["guidance"],
        "generator": torch.Generator().manual_seed(_SEED + 1),
        "output_type": "np",
        "return_dict": False,
        "height": height,
        "width": width,
        "clean_caption": False,
        "use_resolution_binning": False,
        "use_clipped_model_output": True,
        "noise_level": conditions.get("noise_level"),
        "class_labels": [conditions["class"]] if "class" in conditions else None,
        "batch_size": 1,
    }
    if request.image is not None:
        given["image"] = torch.tensor(np.moveaxis(request.image, -1, 0)[None])
        given["strength"] = 1.0
    if request.mask is not None:
        given["mask_image"] = torch.tensor(request.mask[None, None])
    if "upscale" in config and not config["upscale"]["resize"]:
        del given["height"], given["width"]
    return given
