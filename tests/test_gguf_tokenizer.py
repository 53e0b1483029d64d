"""A tokenizer read out of a GGUF splits text as the tokenizer that went into it."""

import itertools
import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from leangen.errors import SourceError, UnsupportedError
from leangen.exporters import gguf_tokenizer

CORPUS = [
    "Hello world, hello 1234 words! It's the year 2024; we've been here 10 times.\n\n",
    "Il était une fois — 12,5 % d'économies… naïve café\t\ttab  double   triple\r\n",
    "def f(x):\n    return x ** 2  # square\n" * 3,
    "数字 ٣٤ emoji 🦆🦆 combining e\u0301 can't CAN'T they'll",
]


def metadata(tokens, **more):
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens}
    return keys | {f"tokenizer.ggml.{key}": value for key, value in more.items()}


def read(folder, keys):
    config = gguf_tokenizer.write(folder, keys)
    return Tokenizer.from_file(str(folder / "tokenizer.json")), config


def trained(pre_tokenizer):
    """A byte-level BPE as Hugging Face models have it, and its GGUF metadata."""
    original = Tokenizer(models.BPE())
    original.pre_tokenizer = pre_tokenizer
    original.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=500, initial_alphabet=alphabet, special_tokens=["<|end|>"], show_progress=False
    )
    original.train_from_iterator(CORPUS, trainer)
    vocab = original.get_vocab()
    tokens = sorted(vocab, key=vocab.get)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in json.loads(original.to_str())["model"]["merges"]
    ]
    return original, tokens, merges


GPT2 = trained(pre_tokenizers.ByteLevel(add_prefix_space=False))
SMOLLM = trained(
    pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """(original, read back) by name of the pre-tokenizer."""
    made = {}
    for name, (original, tokens, merges) in {"gpt-2": GPT2, "smollm": SMOLLM}.items():
        keys = metadata(tokens, pre=name, merges=merges, token_type=[3] + [1] * (len(tokens) - 1))
        made[name] = original, read(tmp_path_factory.mktemp(name), keys)[0]
    return made


@pytest.mark.parametrize("name", ["gpt-2", "smollm"])
@given(text=st.one_of(st.text(max_size=60), st.sampled_from(CORPUS)))
@settings(max_examples=150)
def test_same_tokens_as_hugging_face(pairs, name, text):
    original, ours = pairs[name]
    assert ours.encode(text).ids == original.encode(text).ids
    assert ours.decode(ours.encode(text).ids, skip_special_tokens=False) == text


def test_special_tokens_are_parsed_and_skipped(pairs):
    ours = pairs["smollm"][1]
    ids = ours.encode("Hello<|end|> world").ids
    assert ids.count(0) == 1
    assert ours.decode(ids) == "Hello world"


WORDS_OF = {
    "llama-bpe": "I|'LL| pay| |123|456| €| (|now|)!\n\n",
    "qwen2": "I|'LL| pay| |1|2|3|4|5|6| €| (|now|)!\n\n",
    "smollm": "I|'|LL| pay| |1|2|3|4|5|6| €| (|now|)!|\n\n",
    "gpt-2": "I|'|LL| pay| 123456| €| (|now|)!|\n\n",
    "default": "I|'|LL| pay| |123|456| €| |(|now|)!|\n\n",
}


@pytest.mark.parametrize("pre", WORDS_OF)
def test_words_of_each_pre_tokenizer(tmp_path, pre):
    _, tokens, _ = GPT2
    ours, _ = read(tmp_path, metadata(tokens, pre=pre, merges=[]))
    text = "I'LL pay 123456 € (now)!\n\n"
    spans = [span for _, span in ours.pre_tokenizer.pre_tokenize_str(text)]
    assert [text[start:end] for start, end in spans] == WORDS_OF[pre].split("|")


def sentencepiece_reference(text, pieces):
    """SentencePiece BPE by its definition: join the neighbours whose piece scores highest."""
    symbols = list("▁" + text.replace(" ", "▁"))
    while True:
        joints = [
            (pieces[a + b], -i)
            for i, (a, b) in enumerate(itertools.pairwise(symbols))
            if a + b in pieces
        ]
        if not joints:
            return symbols
        _, place = max(joints)
        i = -place
        symbols[i : i + 2] = [symbols[i] + symbols[i + 1]]


WORDS = ["▁", *"abcdeh ".strip(), "▁a", "ab", "▁ab", "abc", "bc", "de", "cde", "▁he", "ea", "▁head"]


@given(text=st.text(alphabet="abcdeh ", min_size=1, max_size=40))
@settings(max_examples=200)
def test_sentencepiece_merges_by_score(tmp_path_factory, text):
    byte_tokens = [f"<0x{i:02X}>" for i in range(256)]
    tokens = ["<unk>", "<s>", "</s>", *byte_tokens, *WORDS]
    first = len(tokens) - len(WORDS)
    scores = [0.0] * first + [-float(i) for i in range(len(WORDS))]
    types = [2, 3, 3] + [6] * 256 + [1] * len(WORDS)
    keys = metadata(
        tokens, model="llama", scores=scores, token_type=types, bos_token_id=1, eos_token_id=2
    )
    ours, config = read(tmp_path_factory.mktemp("spm"), keys)
    pieces = dict(zip(tokens[first:], scores[first:], strict=True))
    ids = ours.encode(text).ids
    assert ids[0] == 1  # BOS by default
    assert ours.encode(text, add_special_tokens=False).ids == ids[1:]
    assert [tokens[i] for i in ids[1:]] == sentencepiece_reference(text, pieces)
    assert ours.decode(ids) == text
    assert ours.decode(ours.encode("a é").ids) == "a é"  # through byte tokens
    assert config == {"bos_id": 1, "eos_ids": [2], "chat_template": None}


def test_what_cannot_be_read_is_named(tmp_path):
    _, tokens, merges = GPT2
    with pytest.raises(UnsupportedError, match="pre-tokenizer 'viking'.*smollm"):
        gguf_tokenizer.write(tmp_path, metadata(tokens, pre="viking", merges=merges))
    with pytest.raises(UnsupportedError, match="'t5'.*gpt2"):
        gguf_tokenizer.write(tmp_path, metadata(tokens, model="t5"))
    with pytest.raises(SourceError, match="tokenizer.ggml.merges"):
        gguf_tokenizer.write(tmp_path, metadata(tokens, pre="gpt-2"))
    with pytest.raises(SourceError, match="does not fit together"):
        gguf_tokenizer.write(tmp_path, metadata(tokens, pre="gpt-2", merges=["no such"]))
    with pytest.raises(SourceError, match="bos token"):
        gguf_tokenizer.write(tmp_path, metadata(tokens, merges=merges, bos_token_id=10**6))


@pytest.mark.parametrize(
    ("merge", "written"),
    [(("a", "b"), "a b"), (("a", " "), ["a", " "]), (("#version", "b"), ["#version", "b"])],
)
def test_a_merge_that_a_string_cannot_tell_stays_a_pair(merge, written):
    vocab = {merge[0]: 0, merge[1]: 1, "".join(merge): 2}
    tokenizer = Tokenizer(models.BPE(vocab, [merge]))
    text = gguf_tokenizer._text(tokenizer)
    assert json.loads(text)["model"]["merges"] == [written]
    assert Tokenizer.from_str(text).to_str() == tokenizer.to_str()


def test_the_chat_template_is_kept_as_it_is(tmp_path):
    _, tokens, merges = GPT2
    template = "{{ messages }}\n naïve"
    keys = metadata(tokens, pre="gpt-2", merges=merges) | {"tokenizer.chat_template": template}
    _, config = read(tmp_path, keys)
    assert (tmp_path / config["chat_template"]).read_text(encoding="utf-8") == template
