"""Pictures row by row: what is given unfinished, kept and drawn again."""

import json

import autoregressive_fixtures
import draws
import numpy as np
import pytest
import tiny_bundles

from leangen import exporters
from leangen.engine import Engine
from leangen.errors import RequestError, UnsupportedError
from leangen.exporters import imagegpt, onnx_file
from leangen.families import image_tokens, pixel_rows
from leangen.families.sampling import Chooser
from leangen.session import Session


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    return Session(tiny_bundles.pixel_rows(tmp_path_factory.mktemp("rows")), threads=1)


def drawn(session, **options):
    engine = Engine(session, baseline_s=0)
    return engine.generate(**options)


def test_a_pixel_is_drawn_from_what_the_whole_picture_says_of_it(rows):
    """One pass over the finished picture gives the logits that each pixel was chosen from."""
    seed = int(draws.rng().integers(100))
    tokens = pixel_rows.draw(rows, seed)
    logits = pixel_rows.logits(rows, tokens, seed)
    chooser = Chooser(pixel_rows.Request(seed=seed).sampling(0), ())
    assert [chooser.choose(each).token for each in logits] == tokens


def test_no_pixel_depends_on_those_after_it(rows):
    tokens = draws.rng().integers(0, 8, 30)
    changed = tokens.copy()
    changed[14] = (changed[14] + 3) % 8
    before, after = (pixel_rows.logits(rows, each.tolist()) for each in (tokens, changed))
    np.testing.assert_allclose(before[:15], after[:15], atol=1e-6)
    assert (np.abs(before[15:] - after[15:]).max(axis=1) > 1e-4).any()


def test_image_i_of_a_seed_is_image_0_of_the_seed_after(rows):
    both = drawn(rows, count=2, seed=4, conditions={"label": 1}).array
    second = drawn(rows, seed=5, conditions={"label": "sock"}).array
    assert both.shape == (2, 5, 6, 1) and np.array_equal(both[1], second[0])
    assert not np.array_equal(drawn(rows, seed=5, conditions={"label": 0}).array, second)


@pytest.mark.parametrize(("strength", "kept"), [(0.4, 3), (0.0, 5), (1.0, 0)])
def test_a_picture_keeps_its_top(rows, strength, kept):
    image = drawn(rows, seed=7).array[0]
    result = drawn(rows, image=image, strength=strength, seed=1)
    assert np.array_equal(result.array[0, :kept], image[:kept])
    assert result.receipt.units.count == (5 - kept) * 6
    again = pixel_rows.nearest(rows.bundle.config, image)
    assert np.allclose(pixel_rows.values(rows.bundle.config, again), image[..., 0])


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"conditions": {"label": 3}}, "condition label is 3, expected 0 to 2"),
        ({"conditions": {"label": "shoe"}}, "expected a number or one of its names, such as sock"),
        ({"image": np.zeros((5, 5))}, r"image has shape \[5, 5, 1\], expected \[5, 6, 1\]"),
        ({"strength": 2.0}, "strength is 2.0, expected a share, 0 to 1"),
        ({"count": 0}, "count is 0, expected a whole number, 1 or more"),
    ],
)
def test_requests_that_make_no_sense(rows, options, told):
    with pytest.raises(RequestError, match=told):
        drawn(rows, **options)


def test_a_file_that_is_no_model_of_rows(tmp_path):
    path = tiny_bundles._graph(
        "g (int64[n, r, 6] rows) => (float[n, r, 6] y) { y = Cast <to = 1> (rows) }",
        tmp_path / "m.onnx",
    )
    with pytest.raises(UnsupportedError, match="takes rows and state_0, state_1 ... and gives"):
        onnx_file.export(path, tmp_path / "out")


def test_a_label_in_front_of_the_pixels(tmp_path):
    """As transformers' ImageGPT, but for the token that begins."""
    torch = pytest.importorskip("torch", reason="the export extra is not installed")
    transformers = pytest.importorskip("transformers", reason="the export extra is not installed")
    torch.manual_seed(0)
    shape = autoregressive_fixtures.IMAGEGPT | {"vocab_size": 35}
    model = transformers.ImageGPTForCausalImageModeling(transformers.ImageGPTConfig(**shape))
    model.lm_head = torch.nn.Linear(shape["n_embd"], 32, bias=False)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    folder = tmp_path / "saved"
    model.eval().save_pretrained(folder)
    labels = json.loads((folder / "config.json").read_text()) | {"labels": ["a", "b", "c"]}
    (folder / "config.json").write_text(json.dumps(labels))
    greys = {"clusters": np.linspace(-1, 1, 32).round(3)[:, None].tolist()}
    (folder / "preprocessor_config.json").write_text(json.dumps(greys))
    assert exporters.find(folder) is imagegpt
    session = Session(exporters.export(folder, tmp_path / "bundle"), threads=1)
    tokens = draws.rng().integers(0, 32, 36).tolist()
    for name, start in (("a", 32), ("c", 34)):
        with torch.no_grad():
            expected = model(torch.tensor([[start, *tokens[:-1]]])).logits[0].numpy()
        asked = image_tokens.Request(conditions={"label": name})
        got = image_tokens.logits(session, tokens, request=asked)
        np.testing.assert_allclose(got, expected, atol=1e-4 * max(1, np.abs(expected).max()))
    assert drawn(session, count=2, conditions={"label": 1}).array.shape == (2, 6, 6, 1)
    with pytest.raises(RequestError, match="condition label is 3, expected 0 to 2"):
        drawn(session, conditions={"label": 3})
