"""Tiny models that draw pixels or sound, without torch."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from seq2seq_fixtures import Random

from leangen.bundle import Bundle, create, open_bundle
from leangen.exporters import imagegpt, wavenet

IMAGEGPT = {
    "model_type": "imagegpt", "vocab_size": 33, "n_embd": 64, "n_layer": 2, "n_head": 2,
    "n_positions": 36, "activation_function": "quick_gelu",
}  # fmt: skip
WAVENET = wavenet.Shape(sample_rate_hz=800, levels=64, kernel=2, dilations=(1, 2, 4, 1))


def image(folder: Path) -> Bundle:
    """An ImageGPT of 6 x 6 pixels in 32 colours."""
    layout = imagegpt.layout(IMAGEGPT)
    colours = np.random.default_rng(0).uniform(-1, 1, (32, 3)).astype(np.float32)
    with create(folder / "bundle") as draft:
        imagegpt.write(draft.folder, layout, Random(layout), colours)
        draft.name, draft.family = "tiny-imagegpt", "autoregressive"
        draft.graphs = {"model": "model.onnx"}
        draft.config = imagegpt.config_of(layout)
    return open_bundle(folder / "bundle")


def sound_weights(shape=WAVENET, channels=32, inner=48, skip=40, end=56):
    rng = np.random.default_rng(0)
    weights = {}
    for name, size in wavenet.expected(shape, channels, inner, skip, end).items():
        weight = rng.normal(size=size) / np.sqrt(np.prod(size[1:]))
        weights[f"{name}.weight"] = (3 * weight).astype(np.float32)
        weights[f"{name}.bias"] = rng.normal(size=size[0]).astype(np.float32) * 0.1
    return weights


def sound(folder: Path) -> Bundle:
    """A WaveNet of four layers at 800 Hz."""
    with create(folder / "bundle") as draft:
        draft.config = wavenet.write(draft.folder, WAVENET, sound_weights())
        draft.name, draft.family = "tiny-wavenet", "autoregressive"
        draft.graphs = {"model": "model.onnx"}
    return open_bundle(folder / "bundle")
