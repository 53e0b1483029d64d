"""What comes into being, shown in a terminal meanwhile: pictures, or how much there is."""

from __future__ import annotations

import os
import shutil
from typing import Any, TextIO

import numpy as np

from leangen import media

Array = np.ndarray[Any, Any]

WIDTH = 48
"""Columns of a picture at most; a character shows two pixels, one above the other."""


def drawn(picture: Array, columns: int = WIDTH) -> list[str]:
    """Lines of half blocks in 24-bit colours of an image [h, w, c], made no wider than `columns`.

    Its own least and largest values are black and white, as noise has no range.
    """
    step = max(1, -(-picture.shape[1] // columns))
    pixels = media.to_bytes(picture[None, ::step, ::step], None)[0]
    pixels = np.repeat(pixels, 3, axis=-1) if pixels.shape[-1] == 1 else pixels[..., :3]
    pixels = np.pad(pixels, ((0, pixels.shape[0] % 2), (0, 0), (0, 0)))
    return [
        "".join(
            f"\x1b[38;2;{r};{g};{b}m\x1b[48;2;{R};{G};{B}m▀"
            for (r, g, b), (R, G, B) in zip(upper.tolist(), lower.tolist(), strict=True)
        )
        + "\x1b[0m"
        for upper, lower in zip(pixels[::2], pixels[1::2], strict=True)
    ]


def _is_plain() -> bool:
    """Whether colours are not wanted (no-color.org) or not understood."""
    return bool(os.environ.get("NO_COLOR")) or os.environ.get("TERM") == "dumb"


class Preview:
    """One picture or line that is shown again in its place; nothing where `out` is no terminal.

    Pictures are of colours: none is shown where `NO_COLOR` is set.
    """

    def __init__(self, out: TextIO) -> None:
        self._out = out
        self._lines = 0

    def show(self, picture: Array) -> None:
        """Draw an image [h, w, c] over the one before."""
        if not self._out.isatty() or _is_plain():
            return
        lines = drawn(picture, min(WIDTH, shutil.get_terminal_size().columns))
        back = f"\x1b[{self._lines}A" if self._lines else ""
        self._out.write(back + "\n".join(lines) + "\n")
        self._out.flush()
        self._lines = len(lines)

    def tell(self, text: str) -> None:
        """Write a line over the one before; an empty one takes it away."""
        if self._out.isatty():
            self._out.write(f"\r\x1b[K{text}")
            self._out.flush()
