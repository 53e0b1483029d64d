"""Constrained text obeys its grammar whatever the model would rather say."""

import json
import re
import subprocess
import sys

import pytest
from gguf_fixtures import Tiny
from test_language import generate, make
from tokenizers import Tokenizer, decoders, models

from leangen.errors import RequestError
from leangen.families.grammar import Vocabulary
from leangen.families.language import Request

pytest.importorskip("llguidance", reason="the grammar extra is not installed")

SCHEMA = {
    "type": "object",
    "properties": {
        "name": {"enum": ["ann", "bob"]},
        "age": {"type": "integer", "minimum": 10, "maximum": 99},
    },
    "required": ["name", "age"],
    "additionalProperties": False,
    "x-guidance": {"whitespace_flexible": False},
}


@pytest.fixture(scope="module")
def session(tmp_path_factory):
    return make(tmp_path_factory.mktemp("grammar"), Tiny(tied=False, context=512))


@pytest.mark.parametrize("schema", [SCHEMA, json.dumps(SCHEMA)], ids=["mapping", "text"])
@pytest.mark.parametrize("options", [{}, {"temperature": 1.5}, {"speculate": 8}])
def test_json_of_a_schema(session, schema, options):
    for seed in range(5):
        _, output = generate(session, "hello", json_schema=schema, seed=seed, **options)
        said = json.loads(output.text)
        assert set(said) == {"name", "age"}
        assert said["name"] in ("ann", "bob") and 10 <= said["age"] <= 99
        assert output.stop_reason == "eos"


@pytest.mark.parametrize("seed", range(5))
def test_text_matches_a_regular_expression(session, seed):
    pattern = r"[ab]{3,9}-(\d\d|é🦆)"
    options = {"regex": pattern, "temperature": 2.0, "seed": seed}
    _, output = generate(session, "hello", **options)
    assert re.fullmatch(pattern, output.text)
    assert generate(session, "hello", speculate=4, **options)[1].tokens == output.tokens


def test_text_of_a_grammar(session):
    _, output = generate(session, "a", lark='start: ("x" | "yy")~3 "."', temperature=2.0)
    assert re.fullmatch(r"(x|yy){3}\.", output.text)


def test_each_sample_begins_the_grammar_anew(session):
    _, output = generate(session, "a", regex="[a-z]{4}", temperature=2.0, n=3)
    texts = [reply.text for reply in output.extra["samples"]]
    assert all(re.fullmatch("[a-z]{4}", text) for text in texts) and len(set(texts)) > 1


def test_too_few_tokens_cut_the_text(session):
    _, output = generate(session, "a", regex="[a-z]{40}", max_new_tokens=5)
    assert (output.stop_reason, len(output.tokens)) == ("length", 5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"regex": "[ab"}, "regex cannot be followed: .*unclosed|regex cannot be followed"),
        ({"lark": "start: foo"}, 'lark cannot be followed: .*unknown name: "foo"'),
        ({"json_schema": {"type": "nonsense"}}, "json_schema cannot be followed"),
        ({"json_schema": {"minimum": 10**20}}, "json_schema cannot be followed"),
        ({"json_schema": "{nonsense"}, "json_schema is not a JSON object"),
        ({"json_schema": {"type": {1}}}, "json_schema is not a JSON object"),
        ({"regex": 3}, "regex is of type int"),
        ({"regex": "a", "lark": "start: x"}, "regex and lark, expected one"),
        ({"regex": "a", "ignore_eos": True}, "drop ignore_eos"),
    ],
)
def test_grammars_that_make_no_sense_are_refused(session, options, message):
    with pytest.raises(RequestError, match=message):
        generate(session, "a", **options)


def test_a_tokenizer_that_llguidance_does_not_read_is_refused():
    tokenizer = Tokenizer(models.WordLevel({"C": 0, "N": 1, "[end]": 2}, "N"))
    tokenizer.decoder = decoders.Fuse()
    with pytest.raises(RequestError, match="llguidance cannot read this model's tokenizer"):
        Vocabulary(tokenizer, 3, [2])


def test_the_receipt_says_which_kind_and_not_what():
    described = Request("a", regex="secret").describe()
    assert described["constraint"] == "regex" and "secret" not in json.dumps(described)
    assert Request("a").describe()["constraint"] is None


def test_without_a_grammar_llguidance_is_not_imported():
    code = "import sys, leangen.families.language; print('llguidance' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"
