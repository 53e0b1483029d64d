"""Pictures in a terminal: two pixels a character, drawn over the one before, never into a pipe."""

import io
import re

import numpy as np
import pytest
from tiny_bundles import diffusion

from leangen.engine import Engine
from leangen.preview import Preview, drawn
from leangen.session import Session


@pytest.fixture(autouse=True)
def colours_are_known(monkeypatch):
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm-256color")


class Terminal(io.StringIO):
    def isatty(self):
        return True


def colours(line):
    """The (upper, lower) colours of each character."""
    found = re.findall(r"38;2;(\d+);(\d+);(\d+)m\x1b\[48;2;(\d+);(\d+);(\d+)m▀", line)
    return [(tuple(map(int, row[:3])), tuple(map(int, row[3:]))) for row in found]


def test_a_character_shows_two_pixels():
    picture = np.float32([[[-1], [1]], [[1], [0]], [[1], [1]]])
    lines = drawn(picture)
    black, grey, white = (0,) * 3, (128,) * 3, (255,) * 3
    assert [colours(line) for line in lines] == [
        [(black, white), (white, grey)],
        [(white, black), (white, black)],  # an odd row has nothing below it
    ]
    assert all(line.endswith("\x1b[0m") for line in lines)


@pytest.mark.parametrize(("size", "columns"), [(28, 28), (128, 43), (48, 48)])
def test_a_large_picture_is_made_to_fit(size, columns):
    picture = np.random.default_rng(0).random((size, size, 3), np.float32)
    lines = drawn(picture)
    assert {len(colours(line)) for line in lines} == {columns} and len(lines) == -(-columns // 2)


def test_the_next_one_is_drawn_in_its_place():
    out = Terminal()
    preview = Preview(out)
    for _ in range(3):
        preview.show(np.random.default_rng(0).random((8, 8, 1), np.float32))
    assert out.getvalue().count("\x1b[4A") == 2


def test_a_denoiser_shows_what_it_has_so_far(tmp_path):
    engine = Engine(Session(diffusion(tmp_path), threads=1))
    stream = engine.stream(steps=3, seed=1)
    pictures = [step.picture for step in stream]
    assert len(pictures) == 3 and {picture.shape for picture in pictures} == {(8, 8, 1)}
    np.testing.assert_array_equal(pictures[-1], stream.result.array[0])


def test_a_pipe_gets_nothing():
    out = io.StringIO()
    Preview(out).show(np.zeros((4, 4, 1), np.float32))
    assert out.getvalue() == ""


@pytest.mark.parametrize("name, value", [("NO_COLOR", "1"), ("TERM", "dumb")])
def test_where_no_colours_are_wanted_no_picture_is_drawn(monkeypatch, name, value):
    monkeypatch.setenv(name, value)
    out = Terminal()
    Preview(out).show(np.zeros((4, 4, 1), np.float32))
    assert out.getvalue() == ""


def test_a_line_is_written_over_the_one_before():
    out, pipe = Terminal(), io.StringIO()
    for preview in (Preview(out), Preview(pipe)):
        for text in ("0.02 s of sound", "0.04 s of sound", ""):
            preview.tell(text)
    assert out.getvalue() == "\r\x1b[K0.02 s of sound\r\x1b[K0.04 s of sound\r\x1b[K"
    assert not pipe.getvalue()
