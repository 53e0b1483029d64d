"""Radially averaged power spectra: do pictures have as much detail, at each scale, as they should?

Pictures are compared by the shape of their spectrum: mean and variance are removed first, so real
data may have any unit. The distance is the RMS difference in dB over the radial frequencies.
"""

from __future__ import annotations

import zipfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from leangen.errors import RequestError
from leangen.families import imaging
from leangen.quality.measures import Array, Measure, mean

TILES = 256
"""Most pictures that are read from the data."""


def radial(image: Array) -> Array:
    """Power spectrum of [h, w, c] in dB, Hann-windowed, averaged over rings of equal frequency.

    One value per whole cycle of the shorter side, from 1 to below Nyquist; channels are averaged.
    """
    h, w = image.shape[:2]
    centred = image - image.mean(axis=(0, 1))
    centred = centred / max(float(centred.std()), float(np.finfo(np.float32).tiny))
    window = np.outer(np.hanning(h), np.hanning(w))[..., None]
    power = (np.abs(np.fft.fft2(centred * window, axes=(0, 1))) ** 2).mean(axis=-1)
    side = min(h, w)
    cycles = np.hypot(np.fft.fftfreq(h)[:, None], np.fft.fftfreq(w)[None]) * side
    ring = np.rint(cycles).astype(int).ravel()
    rings = slice(1, max(2, side // 2))
    total = np.bincount(ring, power.ravel())[rings]
    count = np.bincount(ring)[rings]
    return np.asarray(10 * np.log10(np.maximum(total / count, np.finfo(np.float64).tiny)))


def measures(
    reference: Sequence[Array], candidate: Sequence[Array], real: Array | None
) -> list[Measure]:
    """Distance of each picture's spectrum to its reference's, and of both means to real data's."""
    before, after = (np.stack([radial(image) for image in part]) for part in (reference, candidate))
    found = [mean("spectrum distance", _rms(after - before), "seeds", "dB")]
    if real is not None:
        wanted = np.stack([radial(image) for image in real]).mean(axis=0)
        found += [
            mean("spectrum distance to data", _rms(after - wanted), "seeds", "dB"),
            mean("reference spectrum distance to data", _rms(before - wanted), "seeds", "dB"),
        ]
    return found


def _rms(difference: Array) -> Array:
    return np.asarray(np.sqrt(np.mean(difference**2, axis=-1)))


def load(path: Path, shape: tuple[int, ...], limits: Sequence[float] | None = None) -> Array:
    """Real pictures as [n, h, w, c] like `shape` [h, w, c]: a folder of images, a .npy or a .npz.

    Black and white of image files become `limits`, the model's own (0 and 1 where it has none);
    arrays hold the model's values, [h, w], [n, h, w], [n, h, w, c] or [n, c, h, w]. Larger pictures
    are cut into whole tiles. Raises RequestError for what cannot be read or is smaller than the
    model's pictures.
    """
    h, w, c = shape
    tiles: list[Array] = []
    for picture in _pictures(path, c, limits or (0.0, 1.0)):
        if picture.shape[2] != c:
            raise RequestError(
                f"{path} holds pictures of {picture.shape[2]} channels, the model draws {c}"
            )
        for top in range(0, picture.shape[0] - h + 1, h):
            for left in range(0, picture.shape[1] - w + 1, w):
                tiles.append(picture[top : top + h, left : left + w].astype(np.float64))
        if len(tiles) >= TILES:
            break
    if not tiles:
        raise RequestError(f"{path} has no picture of {h} x {w} pixels or more")
    found = np.stack(tiles[:TILES])
    if not np.isfinite(found).all():
        raise RequestError(f"{path} holds NaN or infinity: give pictures of finite values")
    return found


def _pictures(path: Path, channels: int, limits: Sequence[float]) -> list[Array]:
    """Arrays [h, w, c]."""
    if path.is_dir():
        low, high = limits
        names = imaging.pictures_in(path)[:TILES]
        return [low + imaging.pixels(name, channels) * (high - low) for name in names]
    try:
        if path.suffix == ".npz":
            with path.open("rb") as file, np.load(file, allow_pickle=False) as archive:
                arrays = [archive[name] for name in archive.files]
        elif path.suffix == ".npy":
            arrays = [np.load(path, allow_pickle=False)]
        else:
            raise RequestError(f"data is {path}, expected a folder of images, a .npy or a .npz")
    except OSError as error:
        raise RequestError(f"cannot read {path}: {error.strerror or error}") from error
    except (ValueError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(f"cannot read {path}: {error}") from error
    found: list[Array] = []
    for array in arrays:
        if array.dtype.kind in "fiu" and array.ndim == 2:
            found.append(array[..., None])
        elif array.dtype.kind in "fiu" and array.ndim == 3:
            found += [image[..., None] for image in array]
        elif array.dtype.kind in "fiu" and array.ndim == 4:
            first = array.shape[1] == channels != array.shape[3]
            found += list(np.moveaxis(array, 1, -1) if first else array)
    if not found:
        raise RequestError(f"{path} has no array [h, w], [n, h, w] or [n, h, w, c] of numbers")
    return found
