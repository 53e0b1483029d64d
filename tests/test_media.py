"""Outputs are written in the form their suffix names, or refused with the forms there are."""

import json
import wave

import numpy as np
import pytest
from PIL import Image
from tiny_bundles import oneshot

from leangen import media
from leangen.engine import Engine
from leangen.errors import RequestError, StorageError
from leangen.records import Output
from leangen.session import Session


def test_text(tmp_path):
    path = media.save(Output(text="joules é\n"), tmp_path / "out.txt")
    assert path.read_text(encoding="utf-8") == "joules é\n"


def test_images_are_scaled_by_the_stated_range(tmp_path):
    array = np.array([-1.0, 0.0, 1.0, 9.0], np.float32).reshape(1, 2, 2, 1)
    output = Output(array=array, media="image", extra={"range": (-1.0, 1.0)})
    with Image.open(media.save(output, tmp_path / "out.png")) as image:
        pixels = np.asarray(image)
    assert pixels.tolist() == [[0, 128], [255, 255]]


def test_several_colour_images_make_a_grid(tmp_path):
    array = np.random.default_rng(0).random((3, 8, 8, 3), np.float32)
    with Image.open(media.save(Output(array=array, media="image"), tmp_path / "out.png")) as image:
        assert (image.size, image.mode) == ((16, 16), "RGB")


def test_a_heightmap_is_lit_from_the_upper_left():
    x, y = np.meshgrid(np.linspace(-1, 1, 33), np.linspace(-1, 1, 33))
    hill = media.relief(np.sqrt(np.clip(1 - x**2 - y**2, 0, None)) / 4).sum(axis=-1, dtype=int)
    assert hill[8, 8] > hill[24, 24]
    np.testing.assert_array_equal(hill, hill.T)
    assert media.relief(np.zeros((4, 5))).shape == (4, 5, 3)


def test_a_constant_image_is_no_division_by_zero(tmp_path):
    output = Output(array=np.ones((1, 4, 4, 1), np.float32), media="image")
    media.save(output, tmp_path / "out.png")


def test_audio(tmp_path):
    samples = np.sin(np.arange(2205) / 10).astype(np.float32)
    output = Output(array=samples, media="audio", sample_rate_hz=22050)
    with wave.open(str(media.save(output, tmp_path / "out.wav"))) as file:
        assert (file.getframerate(), file.getnframes(), file.getnchannels()) == (22050, 2205, 1)


@pytest.fixture
def result(tmp_path):
    """A picture and its receipt."""
    return Engine(Session(oneshot(tmp_path / "model"), threads=1)).generate(seed=5)


def test_a_picture_keeps_its_seed_and_receipt(result, tmp_path):
    with Image.open(result.save(tmp_path / "out.png")) as image:
        told = image.text
    assert told["Title"] == "tiny:fp32, seed 5" and told["Software"].startswith("leangen")
    receipt = json.loads(told["Comment"])
    expected = result.receipt.to_json()
    del expected["host"]  # a picture is passed on: it does not say which machine drew it
    assert receipt == expected


@pytest.mark.parametrize("count", [100, 101])
def test_a_sound_keeps_its_receipt_and_stays_a_sound(result, tmp_path, count):
    samples = np.sin(np.arange(count) / 10).astype(np.float32)
    output = Output(array=samples, media="audio", sample_rate_hz=8000)
    path = media.save(output, tmp_path / "out.wav", result.receipt)
    content = path.read_bytes()
    assert int.from_bytes(content[4:8], "little") == len(content) - 8
    with wave.open(str(path)) as file:
        assert file.getnframes() == count
    place = content.index(b"LIST")
    assert content[place + 8 : place + 16] == b"INFOINAM"
    start = content.index(b"ICMT") + 8
    length = int.from_bytes(content[start - 4 : start], "little")
    comment = content[start : start + length].rstrip(b"\0")
    assert json.loads(comment)["id"] == result.receipt.id


def test_tables_keep_their_columns_and_digits(tmp_path):
    rows = np.array([[1.5, 2.25], [3.125, -4.0]])
    output = Output(array=rows, media="table", extra={"columns": ("u", "g")})
    path = media.save(output, tmp_path / "out.csv")
    assert path.read_text().splitlines()[0] == "u,g"
    np.testing.assert_array_equal(np.loadtxt(path, delimiter=",", skiprows=1), rows)
    np.testing.assert_array_equal(np.load(media.save(output, tmp_path / "out.npy")), rows)


def test_a_form_that_does_not_fit_names_those_that_do(tmp_path):
    with pytest.raises(RequestError, match=r"cannot save audio as 'out.png'.*\.wav or \.npy"):
        media.save(Output(array=np.zeros(4), media="audio"), tmp_path / "out.png")
    assert list(tmp_path.iterdir()) == []


def test_an_unwritable_place_is_one_clear_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        media.save(Output(text="x"), tmp_path / "file/out.txt")
