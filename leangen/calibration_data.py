"""What a bundle is calibrated on: a user's file, or what the model makes itself.

none        the model's own text, samples, images or speech: nothing to download
*.txt ...   language: text; speech: a line of phonemes each
folder      diffusion: images of the model's size
*.npy       language: token ids [n, t]; flow: rows [n, d]; diffusion: images [n, c, h, w] or
            [n, h, w, c] of the model's values
*.npz       any family: arrays named after the inputs of a graph, one run of it
"""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from leangen import calibrate, families
from leangen.bundle import Bundle
from leangen.calibrate import Feeds, Recorder, evenly
from leangen.errors import RequestError
from leangen.families import density, diffusion, imaging, language, self_text, speech
from leangen.graph_edit import Array
from leangen.session import Session

WINDOW = 256
"""Tokens of one calibration run of a language model."""
WINDOWS = 32
_IMAGES = 16

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
    tokens = self_text.draw(Session(bundle), WINDOWS, _window(bundle), seed=0)
    said = {"own text": {"sequences": WINDOWS, "tokens": int(tokens.size), "seed": 0}}
    return {"model": [prefill(bundle, row) for row in tokens]}, [said]


def _window(bundle: Bundle) -> int:
    return min(WINDOW, int(bundle.config["context_length"]))


def _text(bundle: Bundle, data: Path) -> Found:
    if data.suffix == ".npy":
        ids = _array(data)
        vocab, context = bundle.config["vocab_size"], bundle.config["context_length"]
        if ids.ndim != 2 or not ids.size or ids.dtype.kind not in "iu":
            raise RequestError(
                f"{data} has shape {list(ids.shape)} of {ids.dtype}, expected token ids [n, t]"
            )
        strange = ids[(ids < 0) | (ids >= vocab)]
        if strange.size:
            raise RequestError(f"{data} holds token {strange[0]}, expected 0 to {vocab - 1}")
        if ids.shape[1] > context:
            raise RequestError(
                f"{data} has rows of {ids.shape[1]} tokens, the model reads {context} at once: "
                "cut them"
            )
        rows = list(ids)
    else:
        tokens = language.tokenizer(Session(bundle)).encode(_lines(data)).ids
        size = _window(bundle)
        if len(tokens) < size:
            raise RequestError(
                f"{data} has {len(tokens)} tokens, expected at least {size}: give more text"
            )
        rows = [np.array(tokens[i : i + size]) for i in range(0, len(tokens) - size + 1, size)]
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
    config, session = bundle.config, Session(bundle)
    batches = density.batches_of(density.rows_of(data, config), config)
    scored = [session.run("log_prob", {"x": batch}, ["log_prob"])[0] for batch in batches]
    finite = np.isfinite(np.concatenate(scored))
    if not finite.all():
        raise RequestError(
            f"the model gives {np.sum(~finite)} of {len(finite)} rows of {data} no density, row "
            f"{np.argmin(finite)} first: they are outside of what it knows, leave them out"
        )
    array, _ = calibrate.record(bundle, [density.Request(data=str(data))])
    sampled, said = calibrate.record(bundle)
    return sampled | {"log_prob": array["log_prob"]}, [*said, {"data": data.name}]


def _images(bundle: Bundle, data: Path) -> Found:
    shape = tuple(bundle.config["sample"]["shape"])
    if data.is_dir():
        limits = bundle.config.get("range") or (0.0, 1.0)
        names = evenly(imaging.pictures_in(data), _IMAGES)
        picked = np.concatenate([imaging.picture(name, shape, limits) for name in names])
    else:
        picked = np.stack(evenly(list(_channels_first(data, shape)), _IMAGES)).astype(np.float32)
    recorder = Recorder(bundle)
    steps = max(4, min(8, int(bundle.config["steps"])))
    diffusion.show(recorder, picked, levels=steps)
    return recorder.feeds(8), [{"data": data.name, "images": len(picked), "noise levels": steps}]


def _channels_first(data: Path, shape: tuple[int, ...]) -> Array:
    """Images of a .npy file as [n, c, h, w]."""
    images, (channels, *size) = _array(data), shape
    if images.shape[1:] == (*size, channels) != shape:
        return np.moveaxis(images, -1, 1)
    if images.shape[1:] != shape:
        raise RequestError(
            f"{data} has shape {list(images.shape)}, expected images {['n', *shape]} or "
            f"{['n', *size, channels]}"
        )
    return images


def _named(bundle: Bundle, data: Path) -> Found:
    arrays = _load(data)
    if not isinstance(arrays, dict):
        raise RequestError(f"{data} is a .npy file by its content: name it so")
    session = Session(bundle)
    wanted = {}
    for role in bundle.graphs:
        inputs = {entry.name: entry for entry in session.graph(role).get_inputs()}
        if inputs.keys() == arrays.keys():
            run = {name: _fitted(data, arrays[name], inputs[name]) for name in inputs}
            return {other: [] for other in bundle.graphs} | {role: [run]}, [{"data": data.name}]
        wanted[role] = ", ".join(inputs)
    raise RequestError(
        f"{data} holds {', '.join(arrays) or 'nothing'}, expected the inputs of a graph: "
        + "; ".join(wanted.values())
    )


def _fitted(data: Path, array: Array, wanted: Any) -> Array:
    """An array in the type of the graph's input that it is named after; of its shape it must be."""
    fixed = zip(array.shape, wanted.shape, strict=False)
    if array.ndim != len(wanted.shape) or any(
        isinstance(want, int) and size != want for size, want in fixed
    ):
        raise RequestError(
            f"{data}: {wanted.name} has shape {list(array.shape)}, expected {wanted.shape}"
        )
    kind = wanted.type.removeprefix("tensor(").removesuffix(")")
    kind = {"float": "float32", "double": "float64"}.get(kind, kind)
    if not np.can_cast(array.dtype, kind, "same_kind"):
        raise RequestError(f"{data}: {wanted.name} is {array.dtype}, expected {kind}")
    _check_finite(data, array)
    return array.astype(kind, copy=False)


def _load(data: Path) -> Array | dict[str, Array]:
    """What a .npy file holds, or a .npz one by name."""
    try:
        held = np.load(data, allow_pickle=False)
        if isinstance(held, np.ndarray):
            return held
        with held:
            return {name: held[name] for name in held.files}
    except (ValueError, OSError, EOFError, zipfile.BadZipFile) as error:
        raise RequestError(
            f"{data} cannot be read as {data.suffix}: it is damaged, or holds no plain numbers"
        ) from error


def _array(data: Path) -> Array:
    array = _load(data)
    if isinstance(array, dict):
        raise RequestError(f"{data} is a .npz file by its content: name it so")
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
