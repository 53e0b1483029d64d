"""A tiny bundle of every family, exported the way a user's model would be."""

from __future__ import annotations

import pickle
from pathlib import Path

import numpy as np
from flow_models import coupling_info, flow_state, write_voice
from gguf_fixtures import Tiny, write

from leangen.bundle import Bundle
from leangen.exporters import gguf, piper, pzflow


def language(folder: Path) -> Bundle:
    """Two layers of a llama with random weights."""
    return gguf.export(write(folder / "tiny.gguf", Tiny(tied=False)), folder / "bundle")


def speech(folder: Path) -> Bundle:
    """A VITS of a few hundred weights."""
    return piper.export(write_voice(folder), folder / "bundle")


def density(folder: Path) -> Bundle:
    """Three spline couplings over three columns."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = (np.float32([0, 0, 0]), np.float32([1, 2, 3]), 4)
    parts = [("ShiftBounds", bounds), *[coupling_info(), ("Roll", (1,))] * 3]
    path = folder / "tiny.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state(parts, 3)))
    return pzflow.export(path, folder / "bundle")


BUILDERS = {"language": language, "flow/speech": speech, "flow/density": density}
OPTIONS = {
    "language": {"tokens": [3, 4, 5], "max_new_tokens": 6, "ignore_eos": True},
    "flow/speech": {"phonemes": "abc ab."},
    "flow/density": {"count": 20},
}
"""A request per family that its tiny bundle can carry out."""
