"""The tokenizer inside a GGUF file as a Hugging Face `tokenizer.json`.

Two kinds exist in llama-architecture files: byte-level BPE (`gpt2`), whose pre-tokenizer is named
by `tokenizer.ggml.pre`, and SentencePiece BPE (`llama`), which merges by score.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from tokenizers import (
    AddedToken,
    Regex,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
)

from leangen.errors import LeangenError, SourceError, UnsupportedError

TOKENIZER_FILE = "tokenizer.json"
TEMPLATE_FILE = "chat_template.jinja"

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_SINGLE_DIGITS = (r"\p{N}", _GPT2)
_LLAMA3 = (rf"{_CONTRACTION}|{_WORDS}|\p{{N}}{{1,3}}|{_REST}",)
_QWEN2 = (rf"{_CONTRACTION}|{_WORDS}|\p{{N}}|{_REST}",)

PRE_TOKENIZERS: dict[str, tuple[str, ...]] = {
    "gpt-2": (_GPT2,),
    "olmo": (_GPT2,),
    "phi-2": (_GPT2,),
    "smollm": _SINGLE_DIGITS,
    "starcoder": _SINGLE_DIGITS,
    "refact": _SINGLE_DIGITS,
    "command-r": _SINGLE_DIGITS,
    "codeshell": _SINGLE_DIGITS,
    "exaone": _SINGLE_DIGITS,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "llama-bpe": _LLAMA3,
    "qwen2": _QWEN2,
    "stablelm2": _QWEN2,
    "deepseek-r1-qwen": _QWEN2,
    "default": (r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"),
}
"""Regular expressions by `tokenizer.ggml.pre`, each splitting what the one before left."""

_END_OF_TURN = frozenset(
    "<|im_end|> <|eot_id|> <|eom_id|> <|end|> <|endoftext|> <|end_of_text|> <end_of_turn>".split()
)


def write(folder: Path, metadata: Mapping[str, Any]) -> dict[str, Any]:
    """Write `tokenizer.json` (and the chat template, if any) into `folder`.

    Returns the bundle's config keys: `bos_id` (or None), `eos_ids`, `chat_template` (or None).
    """
    tokens: list[str] = _required(metadata, "tokenizer.ggml.tokens")
    for name in ("bos", "eos", "eot", "eom", "unknown"):
        if not 0 <= metadata.get(f"tokenizer.ggml.{name}_token_id", 0) < len(tokens):
            raise SourceError(f"the GGUF file's {name} token is not among its {len(tokens)} tokens")
    kind = _required(metadata, "tokenizer.ggml.model")
    if kind not in _KINDS:
        raise UnsupportedError(
            f"the GGUF file has a tokenizer of model {kind!r}: leangen reads {', '.join(_KINDS)}"
        )
    try:
        tokenizer, adds_bos = _KINDS[kind](tokens, metadata)
    except LeangenError:
        raise
    except Exception as error:  # the tokenizers library raises plain Exception
        raise SourceError(
            f"the GGUF file's tokenizer does not fit together ({error}): convert it again"
        ) from error
    types = metadata.get("tokenizer.ggml.token_type", [])
    for token, token_type in zip(tokens, types, strict=False):
        if token_type in (_CONTROL, _UNKNOWN):
            tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False)])
        elif token_type == _USER_DEFINED:
            tokenizer.add_tokens([AddedToken(token, special=False, normalized=False)])
    bos = metadata.get("tokenizer.ggml.bos_token_id")
    if bos is not None and metadata.get("tokenizer.ggml.add_bos_token", adds_bos):
        tokenizer.post_processor = processors.TemplateProcessing(
            single=[tokens[bos], "$A"], special_tokens=[(tokens[bos], bos)]
        )
    (folder / TOKENIZER_FILE).write_text(_text(tokenizer), encoding="utf-8")
    template = metadata.get("tokenizer.chat_template")
    if template is not None:
        (folder / TEMPLATE_FILE).write_text(template, encoding="utf-8")
    return {
        "bos_id": bos,
        "eos_ids": _end_ids(tokens, types, metadata),
        "chat_template": None if template is None else TEMPLATE_FILE,
    }


def _text(tokenizer: Tokenizer) -> str:
    """The tokenizer as JSON, each merge as one string: parsed in 0.6 of the time that pairs take.

    Pairs are left where such a string would be read otherwise: at a space, or as a comment. The
    vocabulary is sorted, as the parser's own tree is, which takes another tenth off.
    """
    content = json.loads(tokenizer.to_str())
    model = content["model"]
    pairs = model.get("merges") or []
    if not any(" " in left + right or left.startswith("#version") for left, right in pairs):
        model["merges"] = [f"{left} {right}" for left, right in pairs]
    model["vocab"] = dict(sorted(model["vocab"].items()))
    return json.dumps(content, ensure_ascii=False, separators=(",", ":"))


def _required(metadata: Mapping[str, Any], key: str) -> Any:
    if key not in metadata:
        raise SourceError(f"the GGUF file has no {key!r}: convert it again with its tokenizer")
    return metadata[key]


def _end_ids(tokens: Sequence[str], types: Sequence[int], metadata: Mapping[str, Any]) -> list[int]:
    """Tokens that end a generation: the file's own first, then control tokens known to."""
    named = [metadata.get(f"tokenizer.ggml.{end}_token_id") for end in ("eos", "eot", "eom")]
    known = [
        i
        for i, (token, token_type) in enumerate(zip(tokens, types, strict=False))
        if token_type == _CONTROL and token in _END_OF_TURN
    ]
    return list(dict.fromkeys(i for i in [*named, *known] if i is not None))


def _byte_level(tokens: Sequence[str], metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    pre = metadata.get("tokenizer.ggml.pre", "default")
    if pre not in PRE_TOKENIZERS:
        raise UnsupportedError(
            f"the GGUF file has pre-tokenizer {pre!r}: leangen knows {', '.join(PRE_TOKENIZERS)}"
        )
    llama3 = PRE_TOKENIZERS[pre] is _LLAMA3
    merges = [tuple(merge.split(" ", 1)) for merge in _required(metadata, "tokenizer.ggml.merges")]
    vocab = {token: i for i, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=merges, ignore_merges=llama3))
    splits = [pre_tokenizers.Split(Regex(regex), "isolated") for regex in PRE_TOKENIZERS[pre]]
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*splits, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    return tokenizer, llama3


def _sentencepiece(tokens: Sequence[str], metadata: Mapping[str, Any]) -> tuple[Tokenizer, bool]:
    vocab = {token: i for i, token in enumerate(tokens)}
    unknown = tokens[metadata.get("tokenizer.ggml.unknown_token_id", 0)]
    tokenizer = Tokenizer(
        models.BPE(
            vocab=vocab,
            merges=_merges(vocab, _required(metadata, "tokenizer.ggml.scores")),
            unk_token=unknown,
            fuse_unk=True,
            byte_fallback=True,
        )
    )
    escape = normalizers.Replace(" ", "▁")
    to_text = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    if metadata.get("tokenizer.ggml.add_space_prefix", True):
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), escape])
        to_text.append(decoders.Strip(" ", 1, 0))
    else:
        tokenizer.normalizer = escape
    tokenizer.decoder = decoders.Sequence(to_text)
    return tokenizer, True


def _merges(vocab: Mapping[str, int], scores: Sequence[float]) -> list[tuple[str, str]]:
    """SentencePiece merges the pair whose joint piece scores highest: the same order as ranks."""
    merges = [
        (-scores[i], vocab[piece[:cut]], vocab[piece[cut:]], piece[:cut], piece[cut:])
        for piece, i in vocab.items()
        for cut in range(1, len(piece))
        if piece[:cut] in vocab and piece[cut:] in vocab
    ]
    return [(left, right) for *_, left, right in sorted(merges)]


_KINDS: dict[str, Callable[[Sequence[str], Mapping[str, Any]], tuple[Tokenizer, bool]]] = {
    "gpt2": _byte_level,
    "llama": _sentencepiece,
}
"""By `tokenizer.ggml.model`: the tokenizer, and whether it starts prompts with BOS by default."""
