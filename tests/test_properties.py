"""A language model's second head: what it says of a text that has ended."""

import json

import gguf_fixtures
import pytest

from leangen.engine import Engine
from leangen.errors import SourceError
from leangen.exporters import gguf
from leangen.families import properties
from leangen.session import Session


def gguf_with(path, text):
    return gguf_fixtures.write(path, gguf_fixtures.Tiny(metadata={properties.KEY: text}))


ENTRY = {"token": 5, "mean": 2.0, "scale": 0.5, "error": 0.125}


def test_a_second_head_is_read_once_the_text_has_ended(tmp_path):
    bundle = gguf.export(gguf_with(tmp_path / "m.gguf", json.dumps({"x": ENTRY})), tmp_path / "b")
    session = Session(bundle, threads=1)
    (end, *_), start = bundle.config["eos_ids"], [1]
    options = {"temperature": 200.0, "logit_bias": {end: 600.0}, "max_new_tokens": 120}
    engine = Engine(session, baseline_s=0)
    result = engine.generate(tokens=start, n=2, **options)
    for reply in result.output.extra["samples"]:
        assert reply.stop_reason == "eos"
        again = properties.of_tokens(session, [*start, *reply.tokens])
        for name, said in reply.to_json()["properties"].items():
            assert said == {"value": pytest.approx(again[name].value, abs=1e-5), "error": 0.125}
    assert result.properties == result.output.extra["samples"][0].properties
    assert "properties" in [step.kind for step in result.receipt.energy.steps]
    said = {"x": properties.Property(1.5, 0.125)}
    assert properties.told(said) == "x 1.50 ± 0.12 (mean absolute error on held-out texts)"
    cut = engine.generate(tokens=start, max_new_tokens=1, logit_bias={end: -1e6})
    assert cut.properties is None and "properties" not in cut.output.extra["samples"][0].to_json()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("nothing", "cannot be read"),
        (json.dumps({"x": {"token": 5}}), "KeyError"),
        (json.dumps({"x": ENTRY | {"token": 10**6}}), "names a token that is not among its"),
    ],
)
def test_a_second_head_that_makes_no_sense(tmp_path, text, told):
    with pytest.raises(SourceError, match=told):
        gguf.export(gguf_with(tmp_path / "m.gguf", text), tmp_path / "b")
    assert not (tmp_path / "b").exists()
