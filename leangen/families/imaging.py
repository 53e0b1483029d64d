"""What the image families share: conditions, noise per sample, images in and out."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen.errors import RequestError
from leangen.families.sampling import check, is_real, is_whole

Array = np.ndarray[Any, Any]

CALIBRATION_SEED = 20_000
"""First seed of calibration; far from the seeds people type, so that figures are not flattered."""
SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")
"""Of the pictures that are looked for in a folder."""
_FEW = 8
"""Numbers that a message repeats."""
_LENGTH_OFF = 0.05
"""How far a vector's length may be off: low precision moves it a little."""


def check_common(request: Any) -> None:
    """RequestError unless there is at least one sample, a seed, and conditions have names."""
    check(
        request,
        count=(is_whole(request.count, 1), "a whole number, 1 or more"),
        seed=(is_whole(request.seed, 0), "a whole number, 0 or more"),
        conditions=(isinstance(request.conditions, Mapping), "a mapping of names to values"),
    )


def generator(seed: int, index: int) -> np.random.Generator:
    """The noise source of one sample: sample i of a seed is the same whatever the count."""
    return np.random.Generator(np.random.PCG64([seed, index]))


def smooth_noise(
    rng: np.random.Generator, shape: Sequence[int], limits: Sequence[float] | None
) -> Array:
    """Noise without fine detail, float32 [1, c, h, w], over the range of values (-1 to 1)."""
    low, high = limits or (-1.0, 1.0)
    coarse = rng.uniform(low, high, (shape[0], -(-shape[1] // 4), -(-shape[2] // 4)))
    fine = np.repeat(np.repeat(coarse, 4, axis=1), 4, axis=2)[:, : shape[1], : shape[2]]
    return fine[None].astype(np.float32)


def condition_feeds(config: Mapping[str, Any], chosen: Mapping[str, Any]) -> dict[str, Array]:
    """Feeds of the conditions, the model's defaults where none is chosen.

    `config["conditions"]` maps a name to `min`, `max`, `default`, `shape` and `dtype`, and perhaps
    to the graph's `input` if that is called otherwise, to `names` of its values, and to the
    `length` of its vectors. A value is a number, a name, or as many numbers as the input takes, an
    array too. Raises RequestError for a condition that the model lacks and for a value out of its
    range.
    """
    known = config.get("conditions", {})
    for name in chosen:
        if name not in known:
            raise RequestError(
                f"condition {name!r} is unknown: expected one of {', '.join(known) or 'none'}"
            )
    return {
        entry.get("input", name): fill(entry, _condition(name, entry, chosen.get(name)))
        for name, entry in known.items()
    }


def fill(entry: Mapping[str, Any], value: Any) -> Array:
    """A condition's input with this value, or these values, for one sample."""
    values, shape = np.asarray(value, entry["dtype"]), entry["shape"]
    if values.size == np.prod(shape):
        values = values.reshape(shape)
    return np.broadcast_to(values, shape).copy()


def _condition(name: str, entry: Mapping[str, Any], value: Any) -> Any:
    """A condition's value as numbers, checked."""
    if value is None:
        return entry["default"]
    if isinstance(value, str):
        names = entry.get("names") or {}
        if value not in names:
            near = difflib.get_close_matches(value, names, n=3, cutoff=0.4) or list(names)[:3]
            hint = f", such as {', '.join(near)}" if near else ""
            raise RequestError(
                f"condition {name} is {value!r}, expected a number"
                f"{' or one of its names' if names else ''}{hint}"
            )
        return names[value]
    if isinstance(value, np.ndarray):
        value = value.ravel().tolist()
    several = isinstance(value, list | tuple)
    wanted = int(np.prod(entry["shape"]))
    if several and len(value) != wanted:
        given = repr(value) if len(value) <= _FEW else f"{len(value)} numbers"
        raise RequestError(f"condition {name} is {given}, expected a number or {wanted}")
    for each in value if several else [value]:
        _check_number(name, entry, each)
    if several and entry.get("length") is not None:
        length = float(np.linalg.norm(value))
        if abs(length / entry["length"] - 1) > _LENGTH_OFF:
            raise RequestError(
                f"condition {name} has length {length:.3g}, expected vectors of length "
                f"{entry['length']:g}: divide it by its own"
            )
    return value


def _check_number(name: str, entry: Mapping[str, Any], value: Any) -> None:
    low, high = entry.get("min"), entry.get("max")
    if not is_real(value):
        raise RequestError(f"condition {name} is {value!r}, expected a number")
    if (low is not None and value < low) or (high is not None and value > high):
        ends = [end for end in (low, high) if end is not None]
        span = " to ".join(f"{end:g}" for end in ends)
        if len(ends) == 1:
            span += " or more" if high is None else " or less"
        raise RequestError(f"condition {name} is {value:g}, expected {span}")


def spread_conditions(config: Mapping[str, Any], share: float) -> dict[str, Any]:
    """What calibration visits: for each condition that has a range a value at `share` of it."""
    known = config.get("conditions", {})
    return {
        name: _between(entry, share)
        for name, entry in known.items()
        if entry.get("min") is not None and entry.get("max") is not None
    } | directions(config, round(100 * share))


def directions(config: Mapping[str, Any], seed: int) -> dict[str, Any]:
    """A random vector for each condition that takes one of a known length."""
    found = {}
    for name, entry in config.get("conditions", {}).items():
        if entry.get("length") is not None:
            drawn = np.random.default_rng(seed).standard_normal(int(np.prod(entry["shape"])))
            found[name] = (drawn * entry["length"] / np.linalg.norm(drawn)).astype(np.float32)
    return found


def described_conditions(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Conditions for a receipt, as plain JSON types; of vectors only how many numbers they have."""
    return {
        name: f"{np.size(value)} numbers" if np.size(value) > _FEW else value
        for name, value in chosen.items()
    }


def _between(entry: Mapping[str, Any], share: float) -> float:
    value: float = entry["min"] + share * (entry["max"] - entry["min"])
    return round(value) if np.dtype(entry["dtype"]).kind in "iu" else value


def images(samples: list[Array]) -> Array:
    """Samples [1, c, h, w] as float32 images [n, h, w, c]."""
    return np.ascontiguousarray(np.moveaxis(np.concatenate(samples), 1, -1), np.float32)


def rendering(config: Mapping[str, Any]) -> dict[str, Any]:
    """How a picture is made of the values, for `Output.extra`."""
    return {"range": config.get("range"), "render": config.get("render")}


def picture(value: Any, shape: Sequence[int], limits: Sequence[float] | None) -> Array:
    """An image as a sample float32 [1, c, h, w] of a model whose samples are `shape`, [c, h, w].

    `value` is an array [h, w, c] (or [1, h, w, c], as outputs are) of the model's own values, or
    the path of a .npy file of one or of a picture, whose black and white become `limits`. Raises
    RequestError for a file that cannot be read, for another shape, as nothing is resized, and for
    values far from `limits`: other models' samples may overshoot, but 0 to 255 is not -1 to 1.
    """
    channels, *size = shape
    what = "image"
    if isinstance(value, str | Path):
        what = f"image {value}"
        value = _read("image", Path(value), channels, limits)
    image = _numbers(what, value)
    image = image[0] if image.ndim == 4 and len(image) == 1 else image
    image = image[..., None] if image.ndim == 2 else image
    if image.shape != (*size, channels):
        raise RequestError(
            f"{what} has shape {list(image.shape)}, expected {[*size, channels]}: "
            "resize it to height, width and channels of the model's samples"
        )
    low, high = limits or (-np.inf, np.inf)
    if image.min() < 2 * low - high or image.max() > 2 * high - low:
        raise RequestError(
            f"{what} goes from {image.min():g} to {image.max():g}, expected the model's values, "
            f"{low:g} (black) to {high:g} (white), or a picture's file"
        )
    return np.moveaxis(image, -1, 0)[None].copy()


def mask(value: Any, shape: Sequence[int]) -> Array:
    """What to paint anew, float32 [1, 1, h, w]: 1 (white) where to, 0 (black) what to keep.

    `value` is an array [h, w] or the path of a .npy file of one or of a picture.
    """
    if isinstance(value, str | Path):
        value = _read("mask", Path(value), 1, (0.0, 1.0))
        value = value[..., 0] if value.ndim == 3 and value.shape[2] == 1 else value
    values = _numbers("mask", value)
    if values.shape != tuple(shape[1:]):
        raise RequestError(
            f"mask has shape {list(values.shape)}, expected {list(shape[1:])}, like the image"
        )
    if values.min() < 0 or values.max() > 1:
        raise RequestError(
            f"mask goes from {values.min():g} to {values.max():g}, expected 0 (keep) to 1 (paint)"
        )
    return values[None, None]


def pictures_in(folder: Path) -> list[Path]:
    """The pictures of a folder by name; RequestError when it holds none."""
    found = sorted(path for path in folder.iterdir() if path.suffix.lower() in SUFFIXES)
    if not found:
        raise RequestError(f"{folder} holds no pictures ({', '.join(SUFFIXES)})")
    return found


def pixels(path: Path, channels: int) -> Array:
    """A picture file as float32 [h, w, c], black 0 and white 1; RequestError for another file."""
    from PIL import Image

    try:
        with Image.open(path) as opened:
            if opened.mode.startswith("I"):  # 16 bits a pixel, which Pillow would cut at 255
                grey = np.asarray(opened, np.float32)[..., None] / 65535
                return np.repeat(grey, channels, axis=-1)
            values = np.asarray(opened.convert("L" if channels == 1 else "RGB"), np.float32) / 255
    except Exception as error:  # Pillow raises many unrelated types for damaged and huge ones
        detail = getattr(error, "strerror", None) or error
        raise RequestError(f"cannot read {path} as a picture: {detail}") from error
    return values.reshape(*values.shape[:2], channels)


def _numbers(what: str, value: Any) -> Array:
    try:
        values = np.asarray(value, np.float32)
    except (TypeError, ValueError) as error:
        raise RequestError(f"{what} is not numeric ({error}): expected an array") from None
    if not np.isfinite(values).all():
        raise RequestError(f"{what} holds NaN or infinity: remove them")
    return values


def _read(what: str, path: Path, channels: int, limits: Sequence[float] | None) -> Array:
    """A .npy file's values, or a picture's [h, w, c], its black and white as `limits`."""
    if path.suffix == ".npy":
        try:
            values: Array = np.load(path, allow_pickle=False)
        except OSError as error:
            raise RequestError(f"cannot read {what} {path}: {error.strerror or error}") from error
        except (ValueError, EOFError) as error:  # damaged or pickled
            raise RequestError(f"cannot read {what} {path} as .npy: {error}") from error
        return values
    if limits is None:
        raise RequestError(
            f"{what} is {path}, but this model does not say which values black and white are: "
            "give the values as a .npy file"
        )
    low, high = limits
    return low + pixels(path, channels) * np.float32(high - low)
