"""What a scheduler's config is taken to say, against trajectories of that scheduler itself."""

from __future__ import annotations

import math

import numpy as np
import pytest
from perfect_denoiser import SHAPE, denoiser, predict, same_noise

from leangen import samplers
from leangen.families import denoising
from leangen.samplers import Level, schedules

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

from leangen.exporters import diffusers_schedulers  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
STEPS = 8
STABLE = {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012}
PLAIN = {"clip_sample": False}
ZERO_SNR = {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
SPACINGS = (
    {"timestep_spacing": "linspace"},
    {"timestep_spacing": "leading", "steps_offset": 1},
    {"timestep_spacing": "trailing"},
)
KARRAS = {"use_karras_sigmas": True}
FLOW = {"use_flow_sigmas": True, "flow_shift": 3.0, "prediction_type": "flow_prediction"}
MULTISTEP = ("DPMSolverMultistepScheduler", "UniPCMultistepScheduler")
CONFIGS = [
    *(("DDIMScheduler", PLAIN | spacing) for spacing in SPACINGS[1:]),
    ("DDIMScheduler", STABLE | PLAIN | ZERO_SNR | SPACINGS[2]),
    *(("DDPMScheduler", PLAIN | spacing) for spacing in SPACINGS),
    ("DDPMScheduler", PLAIN | {"variance_type": "fixed_large"}),
    *(("EulerDiscreteScheduler", STABLE | spacing) for spacing in (*SPACINGS, KARRAS)),
    ("EulerDiscreteScheduler", STABLE | ZERO_SNR | SPACINGS[2]),
    *(("EulerAncestralDiscreteScheduler", STABLE | spacing) for spacing in SPACINGS),
    *(("DPMSolverMultistepScheduler", STABLE | spacing) for spacing in (*SPACINGS, KARRAS)),
    ("DPMSolverMultistepScheduler", STABLE | KARRAS | {"algorithm_type": "sde-dpmsolver++"}),
    ("DPMSolverMultistepScheduler", FLOW),
    *(("UniPCMultistepScheduler", STABLE | spacing) for spacing in (*SPACINGS, KARRAS)),
    ("UniPCMultistepScheduler", FLOW),
    ("LCMScheduler", STABLE | PLAIN),
    *(("FlowMatchEulerDiscreteScheduler", {"shift": shift}) for shift in (1.0, 3.0)),
    ("FlowMatchHeunDiscreteScheduler", {"shift": 3.0}),
]
"""Those of published models. (At linspace DDIMScheduler steps past the timestep that is next.)"""


def level_at(timestep, noise):
    """Of a timestep, perhaps between two of training, as diffusers tells it to a model."""
    if noise["kind"] == "flow":
        return Level(1 - timestep / noise["scale"], timestep / noise["scale"])
    ratios = [level.sigma / level.alpha for level in schedules.trained(noise["schedule"])[:-1]]
    if timestep >= len(ratios):
        return schedules.trained(noise["schedule"])[-1]
    ratio = math.exp(np.interp(timestep, range(len(ratios)), np.log(ratios)))
    return Level(1 / math.hypot(1, ratio), ratio / math.hypot(1, ratio))


def theirs(scheduler, told, begun):
    """What a model is first given, and what the scheduler makes of it with a perfect one."""
    x = torch.tensor(begun) * float(getattr(scheduler, "init_noise_sigma", 1.0))
    shown = []
    for timestep in scheduler.timesteps:
        given = x
        if hasattr(scheduler, "scale_model_input"):
            given = scheduler.scale_model_input(x, timestep)
        shown.append(given.numpy())
        level = level_at(float(timestep), told["noise_level"])
        answer = predict(told["prediction"], given.numpy(), level).astype(np.float32)
        x = scheduler.step(torch.tensor(answer), timestep, x).prev_sample
    return shown[0], x.numpy()


@pytest.mark.parametrize(("kind", "options"), CONFIGS)
def test_a_scheduler_that_is_followed_gives_what_it_would_have_given(kind, options, monkeypatch):
    scheduler = getattr(diffusers, kind)(**options)
    told = diffusers_schedulers.describe({**scheduler.config, "_class_name": kind})
    assert told["reasons"] == {}
    scheduler.set_timesteps(STEPS)
    begun = np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32)
    rng = same_noise(monkeypatch, scheduler)
    first, wanted = theirs(scheduler, told, begun)
    levels = denoising.levels(told, STEPS)
    spread = denoising.pure_noise(told, levels[0])
    # Euler begins with the first level's spread: 0.2% less in Stable Diffusion's schedule
    np.testing.assert_allclose(begun * spread, first, rtol=3e-3)
    sampler = samplers.get(told["sampler"])
    *_, got = sampler.sample(denoiser(told["prediction"]), first, levels, rng)
    # multistep solvers begin flows at 0.999, and round the timesteps between which Karras' lie
    rounded = kind in MULTISTEP and (KARRAS.items() | FLOW.items()) & options.items()
    np.testing.assert_allclose(got, wanted, atol=5e-3 if rounded else 2e-5)


def test_a_missing_method_or_its_variables_are_told():
    told = diffusers_schedulers.describe({"_class_name": "HeunDiscreteScheduler"})
    assert list(told["reasons"]) == ["sampler"]
