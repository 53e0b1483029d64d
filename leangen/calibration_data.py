"""What a bundle is calibrated on: a user's file, or what the model makes itself.

none        the model's own text, samples, images or speech: nothing to download
*.txt ...   language: text; speech: a line of phonemes each
folder      diffusion: images of the model's size
*.npy       language: token ids [n, t]; flow: rows [n, d]; diffusion: images [n, c, h, w]
*.npz       any family: arrays named after the inputs of a graph, one run of it
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen import calibrate, families
from leangen.bundle import Bundle
from leangen.calibrate import Feeds, Recorder, evenly
from leangen.errors import RequestError
from leangen.families import density, diffusion, language, self_text, speech
from leangen.graph_edit import Array
from leangen.session import Session

WINDOW = 256
"""Tokens of one calibration run of a language model."""
WINDOWS = 32
_IMAGES = 16
_SUFFIXES = (".png", ".jpg", ".jpeg", ".bmp", ".webp", ".tif", ".tiff")

Found = tuple[dict[str, list[Feeds]], list[Any]]
"""Feeds by graph role, and what the manifest says of them."""


def feeds(bundle: Bundle, data: Path | None) -> Found:
    """Feeds of each graph of a bundle. Raises RequestError for data that does not fit it."""
    if data is None:
        if bundle.family == "language":
            return _own_text(bundle)
        return calibrate.record(bundle)
    if not data.exists():
        raise RequestError(f"calibration data {data} does not exist")
    if data.suffix == ".npz":
        return _named(bundle, data)
    kind = families.key(bundle)
    read = _READERS.get(kind)
    if read is None:
        raise RequestError(
            f"{data} cannot calibrate a {kind} model: expected a .npz with arrays named after "
            "the graph's inputs"
        )
    return read(bundle, data)


def _own_text(bundle: Bundle) -> Found:
    tokens = self_text.draw(Session(bundle), WINDOWS, WINDOW, seed=0)
    said = {"own text": {"sequences": WINDOWS, "tokens": int(tokens.size), "seed": 0}}
    return {"model": [prefill(bundle, row) for row in tokens]}, [said]


def _text(bundle: Bundle, data: Path) -> Found:
    if data.suffix == ".npy":
        ids = _array(data)
        vocab = bundle.config["vocab_size"]
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise RequestError(
                f"{data} has shape {list(ids.shape)} of {ids.dtype}, expected token ids [n, t]"
            )
        if ids.min() < 0 or ids.max() >= vocab:
            raise RequestError(f"{data} holds token {int(ids.max())}, expected 0 to {vocab - 1}")
        rows = list(ids)
    else:
        tokens = language.tokenizer(Session(bundle)).encode(_lines(data)).ids
        if len(tokens) < WINDOW:
            raise RequestError(
                f"{data} has {len(tokens)} tokens, expected at least {WINDOW}: give more text"
            )
        rows = [
            np.array(tokens[i : i + WINDOW]) for i in range(0, len(tokens) - WINDOW + 1, WINDOW)
        ]
    rows = evenly(rows, WINDOWS)
    said = {"data": data.name, "tokens": sum(len(row) for row in rows)}
    return {"model": [prefill(bundle, row) for row in rows]}, [said]


def prefill(bundle: Bundle, tokens: Array) -> Feeds:
    """Feeds of one run over a whole sequence, with caches of its length."""
    config, length = bundle.config, len(tokens)
    cache = np.zeros((1, config["kv_heads"], length, config["head_dim"]), np.float32)
    names = [f"past_{kind}_{i}" for i in range(config["layers"]) for kind in ("key", "value")]
    return {
        "input_ids": np.asarray(tokens, np.int64)[None],
        "seqlens_k": np.array([length - 1], np.int32),
        "total_sequence_length": np.array(length, np.int32),
        "logits_from": np.zeros(1, np.int64),
        **dict.fromkeys(names, cache),
    }


def _spoken(bundle: Bundle, data: Path) -> Found:
    lines = [line for line in _lines(data).splitlines() if line.strip()]
    requests = [speech.Request(phonemes=line, seed=i) for i, line in enumerate(lines)]
    return calibrate.record(bundle, evenly(requests, 8), limit=8)


def _rows(bundle: Bundle, data: Path) -> Found:
    array, _ = calibrate.record(bundle, [density.Request(data=str(data))])
    sampled, said = calibrate.record(bundle)
    return sampled | {"log_prob": array["log_prob"]}, [*said, {"data": data.name}]


def _images(bundle: Bundle, data: Path) -> Found:
    shape = tuple(bundle.config["sample"]["shape"])
    images = _array(data) if data.is_file() else _pictures(data, shape, bundle.config.get("range"))
    if images.ndim != 4 or images.shape[1:] != shape or not len(images):
        raise RequestError(
            f"{data} has shape {list(images.shape)}, expected images of shape {list(shape)}"
        )
    recorder = Recorder(bundle)
    steps = max(4, min(8, int(bundle.config["steps"])))
    picked = np.stack(evenly(list(images), _IMAGES)).astype(np.float32)
    diffusion.show(recorder, picked, levels=steps)
    return recorder.feeds(8), [{"data": data.name, "images": len(picked), "noise levels": steps}]


def _pictures(folder: Path, shape: tuple[int, ...], span: Sequence[float] | None) -> Array:
    from PIL import Image, UnidentifiedImageError

    low, high = span or (0.0, 1.0)
    found = []
    for path in sorted(p for p in folder.iterdir() if p.suffix.lower() in _SUFFIXES):
        try:
            with Image.open(path) as image:
                raw = np.asarray(image.convert("L" if shape[0] == 1 else "RGB"), np.float32)
        except (UnidentifiedImageError, OSError) as error:
            raise RequestError(f"{path} cannot be read as an image: {error}") from error
        pixels = np.atleast_3d(raw).transpose(2, 0, 1) / 255 * (high - low) + low
        if pixels.shape != shape:
            raise RequestError(
                f"{path} is {pixels.shape[1]} x {pixels.shape[2]} pixels, "
                f"expected {shape[1]} x {shape[2]}"
            )
        found.append(pixels)
    if not found:
        raise RequestError(f"{folder} holds no images ({', '.join(_SUFFIXES)})")
    return np.stack(found)


def _named(bundle: Bundle, data: Path) -> Found:
    try:
        with np.load(data, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(f"{data} cannot be read as .npz: {error}") from error
    session = Session(bundle)
    wanted = {}
    for role in bundle.graphs:
        inputs = {entry.name: entry.shape for entry in session.graph(role).get_inputs()}
        wanted[role] = ", ".join(inputs)
        if inputs.keys() != arrays.keys():
            continue
        for name, array in arrays.items():
            fixed = zip(array.shape, inputs[name], strict=False)
            if array.ndim != len(inputs[name]) or any(
                isinstance(want, int) and size != want for size, want in fixed
            ):
                raise RequestError(
                    f"{data}: {name} has shape {list(array.shape)}, expected {inputs[name]}"
                )
            _check_finite(data, array)
        return {other: [] for other in bundle.graphs} | {role: [arrays]}, [{"data": data.name}]
    raise RequestError(
        f"{data} holds {', '.join(arrays) or 'nothing'}, expected the inputs of a graph: "
        + "; ".join(wanted.values())
    )


def _array(data: Path) -> Array:
    try:
        array: Array = np.load(data, allow_pickle=False)
    except (ValueError, OSError, EOFError) as error:
        raise RequestError(f"{data} cannot be read as .npy: {error}") from error
    _check_finite(data, array)
    return array


def _check_finite(data: Path, array: Array) -> None:
    if not array.size:
        raise RequestError(f"{data} is empty, expected data to calibrate on")
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        raise RequestError(f"{data} holds NaN or infinity: remove those entries")


def _lines(data: Path) -> str:
    try:
        text = data.read_text(encoding="utf-8")
    except (UnicodeDecodeError, OSError) as error:
        raise RequestError(f"{data} cannot be read as UTF-8 text: {error}") from error
    if not text.strip():
        raise RequestError(f"{data} is empty, expected text to calibrate on")
    return text


_READERS: dict[str, Callable[[Bundle, Path], Found]] = {
    "language": _text,
    "flow/speech": _spoken,
    "flow/density": _rows,
    "diffusion": _images,
}
