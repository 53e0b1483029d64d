"""Quality of an image model against its reference: the same noise, picture by picture.

PSNR and SSIM take the reference picture's own range as peak. With several steps the relative RMSE
is told for each, so that it shows where along the trajectory a scheme goes astray.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from leangen.calibrate import evenly
from leangen.errors import RequestError
from leangen.families import diffusion, finished, imaging, oneshot
from leangen.quality import features, spectrum
from leangen.quality.measures import Array, Measure, Task, mean
from leangen.session import Session

_STEPS_TOLD = 8
_SIGMA = 1.5
_RADIUS = 5


@dataclass(frozen=True, slots=True)
class Drawn:
    """Pictures from fixed noise, and what the user gave to judge them by."""

    images: list[Array]
    """Each [h, w, c]."""
    trajectories: list[list[Array]]
    """Per picture what each step left, [1, c, h, w]; the last is the picture."""
    real: Array | None
    """Real pictures [n, h, w, c]."""
    network: features.Network | None


def observe(session: Session, task: Task, reference: Drawn | None) -> Drawn:
    """Draw one picture per seed."""
    if reference is None:
        task = replace(task, reuse=None)  # what reuse changes is what is measured
    trajectories = [_states(session, task, seed) for seed in range(task.seeds)]
    images = [imaging.images(states[-1:])[0] for states in trajectories]
    if not np.isfinite(images).all():
        raise RequestError(
            f"{session.bundle.name}:{session.bundle.scheme} drew values that are not finite: "
            "evaluate it in fp32 to see whether the scheme is at fault"
        )
    if reference is not None:
        return Drawn(images, trajectories, reference.real, reference.network)
    limits = session.bundle.config.get("range")
    return Drawn(
        images,
        trajectories,
        None if task.data is None else spectrum.load(task.data, images[0].shape, limits),
        None if task.features is None else features.Network(task.features),
    )


def measure(reference: Drawn, candidate: Drawn) -> list[Measure]:
    """Relative RMSE first; PSNR, SSIM, steps, spectra, and the named network's distances."""
    pairs = list(zip(reference.images, candidate.images, strict=True))
    apart = mean("relative RMSE", [relative_rmse(a, b) for a, b in pairs], "seeds")
    if reference.images[0].shape[0] == 1:  # an encoder's latents are no picture
        return [apart]
    return [
        apart,
        mean("PSNR", [psnr_db(a, b) for a, b in pairs], "seeds", "dB"),
        mean("SSIM", [ssim(a, b) for a, b in pairs], "seeds"),
        *_per_step(reference, candidate),
        *spectrum.measures(reference.images, candidate.images, reference.real),
        *_perceived(reference, candidate),
    ]


def relative_rmse(reference: Array, candidate: Array) -> float:
    """Root mean square of the difference over that of the reference."""
    size = np.linalg.norm(reference)
    return float(np.linalg.norm(reference - candidate) / max(size, np.finfo(np.float32).tiny))


def psnr_db(reference: Array, candidate: Array) -> float:
    """Peak signal-to-noise ratio; the peak is the reference's own range."""
    mse = float(np.mean((reference - candidate) ** 2))
    peak = max(float(np.ptp(reference)), float(np.finfo(np.float32).tiny))
    return float(20 * np.log10(peak) - 10 * np.log10(max(mse, np.finfo(np.float64).tiny)))


def ssim(reference: Array, candidate: Array) -> float:
    """Structural similarity (Wang et al., 2004) of images [h, w, c], mean over channels.

    Gaussian window of sigma 1.5 and 11 pixels (less for a smaller picture), whole windows only,
    K1 = 0.01, K2 = 0.03, population variances; the data range is the reference's.
    """
    x, y = reference.astype(np.float64), candidate.astype(np.float64)
    span = float(np.ptp(x)) or 1.0
    c1, c2 = (0.01 * span) ** 2, (0.03 * span) ** 2
    mean_x, mean_y = _blur(x), _blur(y)
    var_x, var_y = _blur(x * x) - mean_x**2, _blur(y * y) - mean_y**2
    covariance = _blur(x * y) - mean_x * mean_y
    top = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    return float(np.mean(top / ((mean_x**2 + mean_y**2 + c1) * (var_x + var_y + c2))))


def _blur(image: Array) -> Array:
    """Gaussian-weighted means over whole windows of the first two axes."""
    for axis in (0, 1):
        radius = min(_RADIUS, (image.shape[axis] - 1) // 2)
        weights = np.exp(-0.5 * (np.arange(-radius, radius + 1) / _SIGMA) ** 2)
        windows = np.lib.stride_tricks.sliding_window_view(image, len(weights), axis)
        image = windows @ (weights / weights.sum())
    return image


def _per_step(reference: Drawn, candidate: Drawn) -> list[Measure]:
    steps = len(reference.trajectories[0])
    if len(candidate.trajectories[0]) != steps:
        return []
    pairs = list(zip(reference.trajectories, candidate.trajectories, strict=True))
    return [
        mean(
            f"relative RMSE after step {step + 1} of {steps}",
            [relative_rmse(a[step], b[step]) for a, b in pairs],
            "seeds",
        )
        for step in evenly(range(steps - 1), _STEPS_TOLD)
    ]


def _perceived(reference: Drawn, candidate: Drawn) -> list[Measure]:
    if reference.network is None:
        return []
    return reference.network.measures(
        np.stack(reference.images), np.stack(candidate.images), reference.real
    )


def _states(session: Session, task: Task, seed: int) -> list[Array]:
    """What each step leaves, [1, c, h, w]; a one-shot model has a single one."""
    if session.bundle.family == "diffusion":
        request = replace(diffusion.trial(session, seed), steps=task.steps, reuse=task.reuse)
        return list(diffusion.trajectory(session, request))
    output = finished(oneshot.run(session, oneshot.Request(seed=seed)))
    made = np.asarray(output.array)
    if made.ndim == 2:  # an encoder's latents
        return [made[:, None, None]]
    return [np.moveaxis(made, -1, 1)]
