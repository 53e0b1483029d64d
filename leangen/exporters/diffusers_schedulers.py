"""What a scheduler of diffusers says of its model: noise levels, prediction, sampler."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from leangen.errors import SourceError, UnsupportedError
from leangen.samplers import schedules

SAMPLERS = {
    "CMStochasticIterativeScheduler": "consistency",
    "DDIMScheduler": "ddim",
    "DDPMScheduler": "ddpm",
    "DEISMultistepScheduler": "unipc",
    "DPMSolverMultistepScheduler": "dpmpp_2m",
    "DPMSolverSinglestepScheduler": "dpmpp_2m",
    "EulerAncestralDiscreteScheduler": "euler_ancestral",
    "EulerDiscreteScheduler": "euler",
    "FlowMatchEulerDiscreteScheduler": "euler",
    "FlowMatchHeunDiscreteScheduler": "heun",
    "HeunDiscreteScheduler": "heun",
    "KDPM2DiscreteScheduler": "heun",
    "LCMScheduler": "lcm",
    "LMSDiscreteScheduler": "dpmpp_2m",
    "PNDMScheduler": "dpmpp_2m",
    "UniPCMultistepScheduler": "unipc",
}
"""The sampler that is a scheduler's method, or that takes the place of one leangen has not."""
_STAND_INS = {
    "DEISMultistepScheduler": "another multistep solver of the same order",
    "DPMSolverSinglestepScheduler": "its multistep form",
    "KDPM2DiscreteScheduler": "another method of second order",
    "LMSDiscreteScheduler": "a multistep solver of the diffusion ODE",
    "PNDMScheduler": "a multistep solver of the diffusion ODE",
}
_BETWEEN = (
    *("EulerAncestralDiscreteScheduler", "EulerDiscreteScheduler", "HeunDiscreteScheduler"),
    *("KDPM2DiscreteScheduler",),
)
"""Schedulers that do not round their timesteps."""
_MULTISTEP = ("dpmpp_2m", "dpmpp_2m_sde", "unipc")
_BETAS = {
    "linear": "linear",
    "scaled_linear": "scaled_linear",
    "squaredcos_cap_v2": "cosine",
    "sigmoid": "sigmoid",
}
_PREDICTIONS = {
    "epsilon": "epsilon",
    "sample": "sample",
    "v_prediction": "v",
    "flow_prediction": "flow",
}
_NOT_FOLLOWED = (
    *("variance_type", "set_alpha_to_one", "final_sigmas_type", "sigma_min", "sigma_max"),
    *("solver_order", "solver_type", "predict_x0", "disable_corrector", "lower_order_final"),
    *("euler_at_final", "lambda_min_clipped", "use_lu_lambdas", "use_exponential_sigmas"),
    *("use_beta_sigmas", "interpolation_type", "timestep_type", "timestep_scaling"),
    *("shift_terminal", "invert_sigmas", "stochastic_sampling", "base_shift", "max_shift"),
)
"""Settings of samplers and their steps that leangen's have not; none belongs to the model."""
PLAIN: Mapping[str, Any] = {"_class_name": "DDPMScheduler"}
"""What a model that was saved without a scheduler is taken to be trained with."""


def describe(config: Mapping[str, Any]) -> dict[str, Any]:
    """The keys `noise_level`, `prediction`, `sampler` and `clip` of a diffusion bundle's config.

    `reasons` says what is not as the scheduler has it. Raises UnsupportedError for a scheduler, or
    a setting of one, that leangen has no equivalent of.
    """
    kind = str(config.get("_class_name"))
    if kind not in SAMPLERS:
        near = difflib.get_close_matches(kind, SAMPLERS, n=1, cutoff=0.3)
        nearest = f" (the nearest is {near[0]})" if near else ""
        raise UnsupportedError(
            f"scheduler {kind} is unknown: expected one of {', '.join(SAMPLERS)}{nearest}"
        )
    usual = _defaults(kind)
    config = usual | dict(config)
    _check_numbers(kind, config)
    reasons = {
        key: f"{key} {config[key]!r} of {kind} is not followed"
        for key in _NOT_FOLLOWED
        if key in usual and config[key] != usual[key]
    }
    if kind in _STAND_INS:
        reasons["sampler"] = f"{SAMPLERS[kind]} for {kind}: {_STAND_INS[kind]}"
    found = {"sampler": SAMPLERS[kind]}
    if kind == "DDPMScheduler" and config["variance_type"] == "fixed_large":
        found["sampler"] = "ddpm_large"
        del reasons["variance_type"]
    if str(config.get("algorithm_type", "")).startswith("sde"):
        found["sampler"] = "dpmpp_2m_sde"
    if str(config.get("algorithm_type", "")).endswith("dpmsolver"):
        reasons["algorithm_type"] = f"{found['sampler']} for {config['algorithm_type']} of {kind}"
    if kind == "CMStochasticIterativeScheduler":
        level = {"kind": "sigma", "min": config["sigma_min"], "max": config["sigma_max"]}
        return found | {
            "noise_level": level | {"input": "sigma"},
            "prediction": "sample",
            "clip": {"limit": 1.0} if config["clip_denoised"] else None,
            "reasons": reasons,
        }
    if kind.startswith("FlowMatch") or config.get("use_flow_sigmas"):
        return found | {
            "noise_level": _flow_level(kind, config, reasons),
            "prediction": "flow",
            "clip": None,
            "reasons": reasons,
        }
    prediction = _PREDICTIONS.get(config["prediction_type"])
    if prediction is None:
        raise UnsupportedError(
            f"prediction {config['prediction_type']!r} is unknown: expected one of "
            f"{', '.join(_PREDICTIONS)}"
        )
    if kind == "HeunDiscreteScheduler":
        reasons["sampler"] = f"heun for {kind}: in the model's variables, not in sigma / alpha"
    if str(config.get("variance_type", "")).startswith("learned"):
        reasons["variance_type"] = "the variances that the model learned are not used"
    return found | {
        "noise_level": _trained_level(kind, config, found["sampler"]),
        "prediction": prediction,
        "clip": _clip(config),
        "reasons": reasons,
    }


def _check_numbers(kind: str, config: Mapping[str, Any]) -> None:
    """SourceError for a number of the noise's that is none."""
    for key, kinds in (
        ("num_train_timesteps", (int,)),
        ("beta_start", (int, float)),
        ("beta_end", (int, float)),
    ):
        value = config.get(key, 1)
        if type(value) not in kinds or not value > 0:
            raise SourceError(f"{kind} has {key} {value!r}, expected a number above 0")


def _flow_level(kind: str, config: Mapping[str, Any], reasons: dict[str, str]) -> dict[str, Any]:
    if config.get("use_dynamic_shifting"):
        reasons["shift"] = "the shift does not depend on the size of the image"
    scale = float(config["num_train_timesteps"])
    shift = float(config.get("shift") or config.get("flow_shift") or 1.0)
    level = {"kind": "flow", "input": "timestep", "scale": scale, "shift": shift}
    if kind.startswith("FlowMatch"):
        level["lowest"] = shift / (scale + shift - 1)  # the shift of 1 / scale; shifted once more
    return level


def _trained_level(kind: str, config: Mapping[str, Any], sampler: str) -> dict[str, Any]:
    spacing = "karras" if config.get("use_karras_sigmas") else config.get("timestep_spacing")
    if kind in _BETWEEN and spacing == "linspace":
        spacing = "even"
    level: dict[str, Any] = {
        "kind": "timestep",
        "input": "timestep",
        "schedule": schedule(config),
        "spacing": spacing or "linspace",
        "offset": config.get("steps_offset") or 0,
    }
    if sampler in _MULTISTEP and spacing in ("linspace", "leading"):
        level["inner"] = True
    if kind == "LCMScheduler":
        level |= {"spacing": "distilled", "distilled": config["original_inference_steps"]}
    return level


def schedule(config: Mapping[str, Any]) -> dict[str, Any]:
    """The levels of the training timesteps, as `samplers.schedules.trained` reads them."""
    kind = config.get("beta_schedule", "linear")
    if config.get("trained_betas") is not None or kind not in _BETAS:
        given = "trained_betas" if config.get("trained_betas") is not None else repr(kind)
        raise UnsupportedError(
            f"noise schedule {given} is unknown: expected one of {', '.join(_BETAS)}"
        )
    found: dict[str, Any] = {
        "kind": _BETAS[kind],
        "timesteps": config.get("num_train_timesteps", 1000),
        "beta_start": config.get("beta_start", 1e-4),
        "beta_end": config.get("beta_end", 0.02),
    }
    if config.get("rescale_betas_zero_snr"):
        found["zero_terminal_snr"] = True
    schedules.trained(found)
    return found


def _clip(config: Mapping[str, Any]) -> dict[str, float] | None:
    """How estimates of the clean sample are kept in range."""
    if config.get("thresholding"):
        return {
            "quantile": float(config.get("dynamic_thresholding_ratio", 0.995)),
            "limit": float(config.get("sample_max_value", 1.0)),
        }
    if config.get("clip_sample"):
        return {"limit": float(config.get("clip_sample_range", 1.0))}
    return None


def _defaults(kind: str) -> dict[str, Any]:
    """What diffusers takes for settings that a config does not have."""
    import diffusers

    return dict(getattr(diffusers, kind)().config)
