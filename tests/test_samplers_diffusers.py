"""Every sampler and schedule against diffusers' scheduler, on the same noise, step by step."""

import math
from dataclasses import dataclass, field

import draws
import numpy as np
import pytest
from perfect_denoiser import SHAPE, denoiser, predict, same_noise

from leangen import samplers
from leangen.samplers import SAMPLERS, Level, schedules

diffusers = pytest.importorskip("diffusers", reason="diffusers is not installed")
torch = pytest.importorskip("torch", reason="torch is not installed")

pytestmark = pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")
STEPS = 10  # 999 / (STEPS - 1) is whole: so are the timesteps
LINEAR = {"kind": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


@dataclass(frozen=True)
class Peer:
    """A scheduler of diffusers, and the options under which it does what the sampler does."""

    scheduler: str
    options: dict = field(default_factory=dict)
    karras: bool = False
    """Whether its x is x0 + (sigma / alpha) noise."""


PEERS = {
    "consistency": Peer("LCMScheduler"),
    "ddim": Peer("DDIMScheduler", {"clip_sample": False}),
    "ddpm": Peer("DDPMScheduler", {"clip_sample": False}),
    "ddpm_large": Peer("DDPMScheduler", {"clip_sample": False, "variance_type": "fixed_large"}),
    "dpmpp_2m": Peer("DPMSolverMultistepScheduler"),
    "dpmpp_2m_sde": Peer("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "euler": Peer("EulerDiscreteScheduler", karras=True),
    "euler_ancestral": Peer("EulerAncestralDiscreteScheduler", karras=True),
    "lcm": Peer("LCMScheduler"),
    "unipc": Peer("UniPCMultistepScheduler"),
}
KINDS = {"sample": "sample", "epsilon": "epsilon", "v": "v_prediction"}
SCHEDULES = {"cosine": "squaredcos_cap_v2"}


def make(name, kind, schedule, **options):
    """The scheduler, ready for STEPS steps."""
    peer = PEERS[name]
    ends = {end: schedule[end] for end in ("beta_start", "beta_end") if end in schedule}
    theirs = getattr(diffusers, peer.scheduler)(
        prediction_type=KINDS[kind],
        beta_schedule=SCHEDULES.get(schedule["kind"], schedule["kind"]),
        num_train_timesteps=schedule["timesteps"],
        **ends,
        **peer.options,
        **options,
    )
    if peer.scheduler == "LCMScheduler":  # its own timesteps are those it was distilled at
        theirs.set_timesteps(timesteps=[999, 759, 499, 259])
    else:
        theirs.set_timesteps(STEPS)
    return theirs


def visited(theirs):
    """The levels at its timesteps; it keeps them in float32."""
    alpha_bar = theirs.alphas_cumprod.double()[theirs.timesteps.long()].tolist()
    return [*(Level(math.sqrt(a), math.sqrt(1 - a)) for a in alpha_bar), samplers.CLEAN]


def noise(sigma=1.0):
    return np.random.default_rng(0).standard_normal(SHAPE).astype(np.float32) * np.float32(sigma)


def compare(name, theirs, kind, levels, rng, *, eta=None):
    karras = PEERS[name].karras
    x = noise(levels[0].sigma)
    their_x = torch.tensor(x / np.float32(levels[0].alpha) if karras else x)
    options = {} if eta is None else {"eta": eta}
    ours = list(samplers.get(name).sample(denoiser(kind), x, levels, rng, **options))
    assert len(ours) == len(theirs.timesteps)
    for timestep, level, after, mine in zip(
        theirs.timesteps, levels[:-1], levels[1:], ours, strict=True
    ):
        scaled = theirs.scale_model_input(their_x, timestep).numpy()
        answer = torch.tensor(predict(kind, scaled, level).astype(np.float32))
        their_x = theirs.step(answer, timestep, their_x, **options).prev_sample
        expected = their_x.numpy() * (after.alpha if karras else 1)
        np.testing.assert_allclose(mine, expected, rtol=1e-4, atol=1e-4)


def test_every_sampler_has_a_peer():
    assert {*PEERS, "heun"} == set(SAMPLERS)


@pytest.mark.parametrize(
    "name, kind",
    [
        (name, kind)
        for name in PEERS
        for kind in KINDS
        if (name, kind) != ("euler_ancestral", "sample")  # theirs does not take it
    ],
)
def test_whole_trajectories_are_those_of_diffusers(name, kind, monkeypatch):
    theirs = make(name, kind, LINEAR)
    levels = visited(theirs)
    compare(name, theirs, kind, levels, same_noise(monkeypatch, theirs))


@pytest.mark.parametrize("name", ["ddim", "ddpm"])
def test_zero_terminal_snr_starts_from_pure_noise_as_in_diffusers(name, monkeypatch):
    options = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
    theirs = make(name, "v", LINEAR, **options)
    levels = visited(theirs)
    assert levels[0] == (0.0, 1.0)
    compare(name, theirs, "v", levels, same_noise(monkeypatch, theirs))


@pytest.mark.parametrize("eta", [0.3, 1.0])
def test_ddim_with_noise_of_its_own_is_that_of_diffusers(eta, monkeypatch):
    theirs = make("ddim", "epsilon", LINEAR)
    levels = visited(theirs)
    compare("ddim", theirs, "epsilon", levels, same_noise(monkeypatch, theirs), eta=eta)


@pytest.mark.parametrize("shift", [1.0, 3.0])
@pytest.mark.parametrize(
    "name, scheduler, per_step",
    [
        ("euler", "FlowMatchEulerDiscreteScheduler", 1),
        ("heun", "FlowMatchHeunDiscreteScheduler", 2),
    ],
)
def test_flow_matching_is_that_of_diffusers(name, scheduler, per_step, shift):
    theirs = getattr(diffusers, scheduler)(shift=shift)
    if per_step == 1:
        theirs.set_timesteps(sigmas=np.linspace(1, 1 / STEPS, STEPS).tolist())
        levels = schedules.flow(STEPS, shift)
        np.testing.assert_allclose(theirs.sigmas, [level.sigma for level in levels], rtol=1e-5)
    else:
        theirs.set_timesteps(STEPS)
        sigmas = [*theirs.sigmas.tolist()[:-1:2], 0.0]
        levels = [Level(1 - sigma, sigma) for sigma in sigmas]
    x = noise()
    *_, ours = samplers.get(name).sample(denoiser("flow"), x, levels, draws.rng())
    their_x = torch.tensor(x)
    sigmas = theirs.sigmas.tolist()
    for place, timestep in enumerate(theirs.timesteps):
        level = Level(1 - sigmas[place], sigmas[place])
        answer = torch.tensor(predict("flow", their_x.numpy(), level).astype(np.float32))
        their_x = theirs.step(answer, timestep, their_x).prev_sample
    np.testing.assert_allclose(ours, their_x.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "unipc"])
def test_multistep_solvers_run_flow_models_as_in_diffusers(name, monkeypatch):
    peer = PEERS[name]
    theirs = getattr(diffusers, peer.scheduler)(
        prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0, **peer.options
    )
    theirs.set_timesteps(STEPS)
    levels = [Level(1 - sigma, sigma) for sigma in theirs.sigmas.double().tolist()]
    compare(name, theirs, "flow", levels, same_noise(monkeypatch, theirs))


def test_heun_is_that_of_diffusers_in_its_variables():
    """HeunDiscreteScheduler samples x0 + sigma noise, which here is alpha = 1."""
    theirs = diffusers.HeunDiscreteScheduler(
        beta_start=LINEAR["beta_start"], beta_end=LINEAR["beta_end"]
    )
    theirs.set_timesteps(STEPS)
    sigmas = theirs.sigmas.tolist()
    levels = [Level(1.0, sigma) for sigma in [*sigmas[:-1:2], 0.0]]
    x = noise(sigmas[0])
    *_, ours = samplers.get("heun").sample(denoiser("epsilon"), x, levels, draws.rng())
    their_x = torch.tensor(x)
    for place, timestep in enumerate(theirs.timesteps):
        answer = predict("epsilon", their_x.numpy(), Level(1.0, sigmas[place]))
        their_x = theirs.step(torch.tensor(answer.astype(np.float32)), timestep, their_x)[0]
    np.testing.assert_allclose(ours, their_x.numpy(), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("kind", schedules.KINDS)
def test_trained_levels_are_those_of_diffusers(kind, zero):
    schedule = {**LINEAR, "kind": kind, "zero_terminal_snr": zero}
    theirs = diffusers.DDPMScheduler(
        beta_start=1e-4,
        beta_end=0.02,
        beta_schedule=SCHEDULES.get(kind, kind),
        rescale_betas_zero_snr=zero,
    )
    alphas = [level.alpha for level in schedules.trained(schedule)]
    np.testing.assert_allclose(alphas, theirs.alphas_cumprod.sqrt(), rtol=1e-4, atol=1e-6)
    assert all(
        math.hypot(*level) == pytest.approx(1, abs=1e-12) for level in schedules.trained(schedule)
    )


@pytest.mark.parametrize("steps", [1, 7, 10, 50])
@pytest.mark.parametrize("spacing, offset", [("linspace", 0), ("leading", 1), ("trailing", 0)])
def test_steps_visit_the_timesteps_of_diffusers(spacing, offset, steps):
    theirs = diffusers.DDIMScheduler(timestep_spacing=spacing, steps_offset=offset)
    theirs.set_timesteps(steps)
    trained = schedules.trained(LINEAR)
    levels = schedules.spaced(trained, steps, spacing, offset)
    ours = [schedules.timestep(trained, level) for level in levels[:-1]]
    if spacing == "linspace" and steps == 1:
        assert ours == pytest.approx([999])  # not their 0, at which there is nothing to remove
    else:
        np.testing.assert_allclose(ours, theirs.timesteps.numpy(), atol=1e-6)


def test_karras_spacing_of_a_timestep_model_is_that_of_diffusers():
    theirs = diffusers.EulerDiscreteScheduler(
        beta_start=1e-4, beta_end=0.02, use_karras_sigmas=True
    )
    theirs.set_timesteps(STEPS)
    trained = schedules.trained(LINEAR)
    levels = schedules.spaced(trained, STEPS, "karras")
    ours = [level.sigma / level.alpha for level in levels]
    np.testing.assert_allclose(ours, theirs.sigmas.numpy(), rtol=1e-3)
    places = [schedules.timestep(trained, level) for level in levels[:-1]]
    np.testing.assert_allclose(places, theirs.timesteps.numpy(), atol=0.2)


@pytest.mark.parametrize("steps", [1, 4, 8])
def test_distilled_models_are_asked_at_the_timesteps_of_diffusers(steps):
    theirs = diffusers.LCMScheduler()
    theirs.set_timesteps(steps)
    levels = schedules.trained(LINEAR)
    ours = schedules.spaced(levels, steps, "distilled", distilled=50)[:-1]
    assert [levels.index(level) for level in ours] == theirs.timesteps.tolist()
