"""Writing outputs: text, audio, images, tables."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import numpy as np

from leangen import audio
from leangen.errors import RequestError
from leangen.files import write_atomic
from leangen.records import Media, Output, Receipt

SUFFIXES = {
    "text": (".txt",),
    "audio": (".wav", ".npy"),
    "image": (".png", ".npy"),
    "table": (".csv", ".npy"),
}


def save(output: Output, path: Path, receipt: Receipt | None = None) -> Path:
    """Write an output in the form that the suffix names, atomically; returns the path.

    A .png and a .wav carry their receipt, request and seed included, but not the machine's ids.
    Raises RequestError for a suffix that the output cannot take.
    """
    write_atomic(path, encode(output, suffix_for(output.media, path), receipt))
    return path


_INFO = {"Title": "INAM", "Software": "ISFT", "Comment": "ICMT"}
"""The names that PNG gives to texts, and those of WAV."""


def _notes(receipt: Receipt) -> dict[str, str]:
    """What a file says of how it was made; the comment is the receipt as JSON."""
    document = receipt.to_json()
    for part in (document, *document.get("parts", ())):
        del part["host"]
    seed = receipt.request.get("seed")
    return {
        "Title": f"{receipt.model}:{receipt.scheme}" + ("" if seed is None else f", seed {seed}"),
        "Software": f"leangen {receipt.runtime.versions.get('leangen', '')}".strip(),
        "Comment": json.dumps(document, ensure_ascii=False),
    }


def suffix_for(media: Media, path: Path) -> str:
    """The suffix of `path` in lower case; RequestError for one that `media` cannot take."""
    suffix = path.suffix.lower()
    if suffix not in SUFFIXES[media]:
        raise RequestError(
            f"cannot save {media} as {path.name!r}: "
            f"use a name that ends in {' or '.join(SUFFIXES[media])}"
        )
    return suffix


def encode(output: Output, suffix: str, receipt: Receipt | None = None) -> bytes:
    """The bytes of an output as .txt, .csv or .npy, or as .png or .wav, which keep the receipt."""
    if suffix == ".txt":
        return (output.text or "").encode()
    array = np.asarray(output.array)
    notes = {} if receipt is None else _notes(receipt)
    if suffix == ".wav":
        named = {_INFO[name]: text for name, text in notes.items()}
        return audio.wav_bytes(array, int(output.sample_rate_hz or 0), named)
    buffer = io.BytesIO()
    if suffix == ".npy":
        np.save(buffer, array)
    elif suffix == ".csv":
        rows = array if array.ndim == 2 else array[:, None]
        header = ",".join(output.extra.get("columns", ()))
        np.savetxt(buffer, rows, delimiter=",", header=header, comments="", fmt="%.9g")
    else:
        from PIL import Image
        from PIL.PngImagePlugin import PngInfo

        if output.extra.get("render") == "relief":
            tiles = np.stack([relief(image[..., 0]) for image in array])
        else:
            tiles = to_bytes(array, output.extra.get("range"))
        info = PngInfo()
        for name, text in notes.items():
            info.add_itxt(name, text, zip=len(text) > 1000)
        Image.fromarray(grid(tiles)).save(buffer, "png", pnginfo=info)
    return buffer.getvalue()


def to_bytes(
    images: np.ndarray[Any, Any], limits: tuple[float, float] | None
) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Float images [n, h, w, c] as uint8; `limits` maps to 0..255, None takes their own range."""
    low, high = limits or (float(images.min()), float(images.max()))
    scaled = (images - low) / max(high - low, float(np.finfo(np.float32).tiny))
    return np.asarray(np.round(np.clip(scaled, 0, 1) * 255), dtype=np.uint8)


_ALTITUDES = (0.0, 0.15, 0.45, 0.75, 1.0)
_COLOURS = ((58, 104, 122), (96, 140, 96), (176, 166, 112), (146, 116, 92), (244, 242, 238))
_LIGHT = np.array([-1.0, -1.0, 1.6]) / np.linalg.norm([-1.0, -1.0, 1.6])
_STEEPNESS = 20.0  # a slope of 1 per 20 pixels is drawn as 45 degrees: heights span about 1


def relief(heights: np.ndarray[Any, Any]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """A heightmap [h, w] as a map [h, w, 3]: lit from the upper left, coloured by altitude."""
    down, right = np.gradient(heights.astype(np.float64) * _STEEPNESS)
    normals = np.stack([-right, -down, np.ones_like(down)], axis=-1)
    normals /= np.linalg.norm(normals, axis=-1, keepdims=True)
    shade = 0.35 + 0.85 * np.clip(normals @ _LIGHT, 0, 1)
    low, span = heights.min(), np.ptp(heights) or 1.0
    altitude = (heights - low) / span
    colours = [np.interp(altitude, _ALTITUDES, channel) for channel in zip(*_COLOURS, strict=True)]
    drawn = np.stack(colours, axis=-1) * shade[..., None]
    return np.asarray(np.clip(drawn, 0, 255), dtype=np.uint8)


def grid(images: np.ndarray[Any, np.dtype[np.uint8]]) -> np.ndarray[Any, np.dtype[np.uint8]]:
    """Images [n, h, w, c] side by side in a near-square grid [H, W] or [H, W, c].

    >>> grid(np.zeros((5, 2, 3, 1), np.uint8)).shape
    (4, 9)
    """
    n, height, width, channels = images.shape
    columns = int(np.ceil(np.sqrt(n)))
    rows = -(-n // columns)
    padded = np.zeros((rows * columns, height, width, channels), np.uint8)
    padded[:n] = images
    tiled = padded.reshape(rows, columns, height, width, channels).swapaxes(1, 2)
    whole = tiled.reshape(rows * height, columns * width, channels)
    return whole[..., 0] if channels == 1 else whole
