"""Noise schedules: which levels a model was trained at, which of them the steps visit."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal

import numpy as np

from leangen.errors import UnsupportedError
from leangen.samplers import CLEAN, Array, Level

Prediction = Literal["sample", "epsilon", "v", "flow"]
Floats = np.ndarray[Any, np.dtype[np.float64]]
KINDS = ("linear", "scaled_linear", "cosine", "sigmoid")
SPACINGS = ("linspace", "even", "leading", "trailing", "karras", "distilled")


def karras(steps: int, sigma_min: float, sigma_max: float, rho: float = 7.0) -> list[Level]:
    """`steps` levels with alpha = 1 from sigma_max to sigma_min, then 0 (arXiv 2206.00364, eq. 5).

    >>> karras(1, 0.002, 80.0)
    [Level(alpha=1.0, sigma=80.0), Level(alpha=1.0, sigma=0.0)]
    """
    ramp = np.linspace(sigma_max ** (1 / rho), sigma_min ** (1 / rho), steps) ** rho
    return [Level(1.0, sigma) for sigma in (float(sigma_max), *ramp[1:].tolist())] + [CLEAN]


def flow(steps: int, shift: float = 1.0, lowest: float | None = None) -> list[Level]:
    """alpha = 1 - t, sigma = t from t = 1 to 0 in even steps, moved towards noise by `shift`.

    Large images need more of their steps at high noise: arXiv 2403.03206, eq. 23. With `lowest`
    the even steps end there, and one more goes to 0.
    """
    t = np.linspace(1, 0, steps + 1)
    if lowest is not None:
        t = np.append(np.linspace(1, lowest, steps), 0)
    t = shift * t / (1 + (shift - 1) * t)
    return [Level(1 - each, each) for each in t.tolist()]


def trained(schedule: Mapping[str, Any]) -> list[Level]:
    """The level of each training timestep of a variance-preserving model, noise rising.

    `schedule` has `kind`, `timesteps`, and except for `cosine` `beta_start` and `beta_end`:
    `linear`, `scaled_linear`, `sigmoid`: betas on a line, their roots on it, or along a sigmoid;
    `cosine`: arXiv 2102.09672. `zero_terminal_snr` shifts and scales sqrt(alpha bar) so that the
    last timestep is pure noise (arXiv 2305.08891, alg. 1). Raises UnsupportedError for a kind that
    is none of them.
    """
    kind, count = schedule["kind"], int(schedule["timesteps"])
    if kind not in KINDS:
        raise UnsupportedError(f"schedule {kind!r} is unknown: expected one of {', '.join(KINDS)}")
    if kind == "cosine":
        t = np.arange(count + 1) / count
        alpha_bar = np.cos((t + 0.008) / 1.008 * np.pi / 2) ** 2
        betas = np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], 0.999)
    else:
        first, last = float(schedule["beta_start"]), float(schedule["beta_end"])
        if kind == "linear":
            betas = np.linspace(first, last, count)
        elif kind == "scaled_linear":
            betas = np.linspace(first**0.5, last**0.5, count) ** 2
        else:
            betas = first + (last - first) / (1 + np.exp(-np.linspace(-6, 6, count)))
    alphas = np.sqrt(np.cumprod(1 - betas))
    if schedule.get("zero_terminal_snr", False):
        alphas = (alphas - alphas[-1]) * (alphas[0] / (alphas[0] - alphas[-1]))
    sigmas = np.sqrt(1 - alphas**2)
    return [Level(*pair) for pair in zip(alphas.tolist(), sigmas.tolist(), strict=True)]


def spaced(
    levels: list[Level],
    steps: int,
    spacing: str = "linspace",
    offset: int = 0,
    distilled: int = 50,
    inner: bool = False,
) -> list[Level]:
    """`steps` of the training levels, noise falling, then the clean sample.

    `linspace` goes from the last to the first, `even` between timesteps too; `trailing` counts
    whole strides from the last, `leading` from the first, `offset` further on (arXiv 2305.08891,
    table 2); `karras` spaces sigma / alpha by `karras`, between timesteps too; `distilled` takes of
    the `distilled` trailing levels that a latent consistency model was made at (arXiv 2310.04378).
    `inner` leaves out the last of one more level, of little noise: multistep solvers reach the
    clean sample from further away. Raises UnsupportedError for another spacing.
    """
    if inner:
        return [*spaced(levels, steps + 1, spacing, offset, distilled)[:-2], CLEAN]
    last = len(levels) - 1
    if spacing == "karras":
        ratios = karras(steps, *(levels[end].sigma / levels[end].alpha for end in (0, last)))[:-1]
        lengths = [float(np.hypot(1, ratio.sigma)) for ratio in ratios]
        pairs = zip(ratios, lengths, strict=True)
        return [*(Level(1 / length, ratio.sigma / length) for ratio, length in pairs), CLEAN]
    if spacing == "even":
        angles = [math.atan2(level.sigma, level.alpha) for level in levels]
        turned = np.interp(np.linspace(last, 0, steps)[1:], range(len(levels)), angles).tolist()
        return [levels[last], *(Level(math.cos(each), math.sin(each)) for each in turned), CLEAN]
    if spacing == "linspace":
        places = np.linspace(last, 0, steps) if steps > 1 else np.array([last])
    elif spacing == "trailing":
        places = np.arange(steps, 0, -1) * (len(levels) / steps) - 1
    elif spacing == "leading":
        places = np.arange(steps)[::-1] * (len(levels) // steps) + offset
    elif spacing == "distilled":
        known = np.arange(distilled, 0, -1) * (len(levels) // distilled) - 1
        places = known[np.linspace(0, distilled, steps, endpoint=False).astype(int)]
    else:
        raise UnsupportedError(
            f"spacing {spacing!r} is unknown: expected one of {', '.join(SPACINGS)}"
        )
    return [*(levels[min(place, last)] for place in np.rint(places).astype(int).tolist()), CLEAN]


def timestep(levels: list[Level], level: Level) -> float:
    """Where a level lies among the training levels, as a timestep; between two by log SNR."""
    if level.alpha == 0:
        return float(len(levels) - 1)
    known = [-each.log_snr for each in levels if each.alpha > 0]
    return float(np.interp(-level.log_snr, known, np.arange(len(known))))


def clean(prediction: Prediction, answer: Array, x: Array, level: Level) -> Array:
    """The clean sample that a model's answer amounts to, for x = alpha * x0 + sigma * noise.

    `epsilon` is the noise, `v` alpha * noise - sigma * x0 (arXiv 2202.00512), `flow` noise - x0.
    Raises UnsupportedError for `epsilon` at alpha 0, where the noise tells nothing of the sample.
    """
    alpha, sigma = level
    if prediction == "sample":
        return answer
    if prediction == "v":
        return (alpha * x - sigma * answer) / (alpha**2 + sigma**2)
    if prediction == "flow":
        return (x - sigma * answer) / (alpha + sigma)
    if alpha == 0:
        raise UnsupportedError(
            "prediction epsilon says nothing of the sample at zero signal-to-noise ratio: "
            "the model's prediction must be v or sample, or its schedule without zero_terminal_snr"
        )
    return (x - sigma * answer) / alpha
