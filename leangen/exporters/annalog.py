"""annalog's SMILES transformer (a molecule in, a similar one out), to a text-to-text bundle.

The checkpoint is a state dict of torch, read with `weights_only`; the vocabulary beside it is a
pickle of plain lists, read by the restricted reader. The layers are those of Vaswani et al.
(1706.03762): norms after each sum, ReLU, learned places, embeddings times sqrt(width).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, processors

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import SourceError, needs
from leangen.exporters import restricted_pickle
from leangen.exporters.checkpoint import Held, Layout, Rows
from leangen.exporters.decoder import DecoderConfig
from leangen.exporters.transformers_seq2seq import shape, write_graphs

HEAD_DIM = 32
"""No tensor tells: 8 heads at the published width of 256."""
SPECIAL = ("<unk>", "<pad>", "<sos>", "<eos>")
_ATOMS = r"\[[^\]]*\]|%[0-9]{2}|Br|Cl|."


def accepts(path: Path) -> bool:
    """Whether it is a `.pt` file with one vocabulary beside it."""
    return path.suffix == ".pt" and len(list(path.parent.glob("*vocab*.pkl"))) == 1


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the checkpoint `path` to a bundle in folder `out`.

    Raises SourceError for a damaged file, missing tensors or an unsafe pickle, DependencyError
    without torch, StorageError.
    """
    (words,) = path.parent.glob("*vocab*.pkl")
    tokenizer = _tokenizer(words)
    stored = _read(path)
    weights = Held(path, stored, _layout(path, stored))
    with create(out, replace=replace) as draft:
        draft.name = name or path.stem.lower()
        draft.family, draft.scheme = "seq2seq", "fp32"
        draft.graphs = write_graphs(draft.folder, weights.layout, weights, mels=0)
        tokenizer.save(str(draft.folder / "tokenizer.json"))
        begin, end = (tokenizer.token_to_id(token) for token in SPECIAL[2:])
        draft.config = {
            "architecture": "annalog",
            **shape(weights.layout),
            "task": "text",
            "start": [begin],
            "bos_id": begin,
            "eos_ids": [end],
            "chat_template": None,
        }
        draft.source = dict(
            source or {"kind": "annalog", "file": path.name, "sha256": sha256_file(path)}
        )
    return open_bundle(out)


def _tokenizer(path: Path) -> Tokenizer:
    """Atoms in brackets, ring bonds above 9, Br and Cl are tokens; so is every other character."""
    stored = restricted_pickle.read(path)
    words = stored.get("itos") if isinstance(stored, dict) else None
    if not isinstance(words, list) or not set(SPECIAL) <= set(words):
        raise SourceError(f"{path} is no vocabulary of annalog: expected `itos` with {SPECIAL}")
    vocabulary = {word: index for index, word in enumerate(words)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=SPECIAL[0]))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(_ATOMS), "isolated")
    tokenizer.decoder = decoders.Fuse()
    tokenizer.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    ends = [(word, vocabulary[word]) for word in SPECIAL[2:]]
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{SPECIAL[2]} $A {SPECIAL[3]}", special_tokens=ends
    )
    return tokenizer


def _read(path: Path) -> dict[str, Rows]:
    message = f"{path.name} is a file of torch: `pip install 'leangen[export]'`"
    with needs("torch", message=message):
        import torch
    from pickle import UnpicklingError

    try:
        stored: Any = torch.load(path, map_location="cpu", weights_only=True)
        return {name: value.float().numpy() for name, value in stored.items()}
    except (UnpicklingError, RuntimeError, OSError, EOFError, AttributeError) as error:
        reason = str(error).splitlines()[0]
        raise SourceError(
            f"{path} is not a state dict that can be read safely ({reason}): download it again"
        ) from error


def _layout(path: Path, stored: Mapping[str, Rows]) -> Layout:
    names = {"head": "decoder.fc_out"}
    for prefix, side in (("", "decoder"), ("encoder.", "encoder")):
        layer = f"{side}.layers.{{i}}"
        names |= {
            f"{prefix}embed": f"{side}.tok_embedding",
            f"{prefix}positions": f"{side}.pos_embedding",
            f"{prefix}attn_post_norm": f"{layer}.self_attn_layer_norm",
            f"{prefix}mlp_post_norm": f"{layer}.ff_layer_norm",
            f"{prefix}up": f"{layer}.positionwise_feedforward.fc_1",
            f"{prefix}down": f"{layer}.positionwise_feedforward.fc_2",
        }
        names |= {f"{prefix}{label}": f"{layer}.self_attention.fc_{label}" for label in "qkvo"}
    layer = "decoder.layers.{i}.encoder_attention"
    names |= {f"cross_{label}": f"{layer}.fc_{label}" for label in "qkvo"}
    names["cross_post_norm"] = "decoder.layers.{i}.enc_attn_layer_norm"

    def stack(side: str, *, cross: bool) -> DecoderConfig:
        tables = [f"{side}.{kind}_embedding.weight" for kind in ("tok", "pos")]
        if missing := [table for table in tables if table not in stored]:
            raise SourceError(f"{path} lacks {', '.join(missing)}: it is no model of annalog")
        (vocab, width), (context, _) = (stored[table].shape for table in tables)
        norm = f"{side}.layers.{{}}.ff_layer_norm.weight"
        return DecoderConfig(
            layers=next(i for i in range(len(stored)) if norm.format(i) not in stored),
            width=width,
            heads=width // HEAD_DIM,
            kv_heads=width // HEAD_DIM,
            head_dim=HEAD_DIM,
            vocab=vocab,
            context=context,
            epsilon=1e-5,
            tied_head=False,
            norm="layer",
            norms="sum",
            activation="relu",
            gated=False,
            learned_positions=True,
            embedding_scale=width**0.5,
            cross=cross,
        )

    encoder, decoder = stack("encoder", cross=False), stack("decoder", cross=True)
    return Layout(config=decoder, encoder=encoder, names=names)
