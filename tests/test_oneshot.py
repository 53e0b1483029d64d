"""One-shot generators: one graph run, one step, one image."""

import numpy as np
import pytest
from image_models import generator

from leangen.errors import RequestError
from leangen.exporters import onnx_file
from leangen.families import oneshot
from leangen.session import Session


def finish(steps):
    done = []
    while True:
        try:
            done.append(next(steps))
        except StopIteration as stop:
            return done, stop.value


@pytest.mark.parametrize("latent", ["normal", "uniform"])
def test_each_image_is_one_step_and_the_graphs_own_answer(tmp_path, latent):
    bundle = onnx_file.export(generator(tmp_path / "g.onnx"), tmp_path / "b", latent=latent)
    session = Session(bundle, threads=1)
    steps, output = finish(oneshot.run(session, oneshot.Request(count=3, seed=4)))
    assert [(step.kind, step.units) for step in steps] == [("decode", 1)] * 3
    assert output.array.shape == (3, 4, 4, 3) and output.media == "image"
    rng = np.random.Generator(np.random.PCG64([4, 2]))
    z = (
        rng.standard_normal((1, 8), np.float32)
        if latent == "normal"
        else rng.uniform(-1, 1, (1, 8))
    )
    image = session.run("model", {"z": z.astype(np.float32)})[0]
    assert np.array_equal(output.array[2], np.moveaxis(image[0], 0, -1))


def test_same_seed_same_images(tmp_path):
    session = Session(onnx_file.export(generator(tmp_path / "g.onnx"), tmp_path / "b"))
    one, two = (finish(oneshot.run(session, oneshot.Request(seed=1)))[1].array for _ in range(2))
    assert np.array_equal(one, two)


def test_bad_requests_are_refused():
    with pytest.raises(RequestError, match="count is -1"):
        oneshot.Request(count=-1)
