"""Train the catalog's smiles-lm: `python bench/train/smiles_lm.py -o DIR`

A llama-shaped decoder on the 1.58M SMILES strings of MOSES (Polykovskiy et al. 2020), written as an
fp16 GGUF that `leangen export` takes (the package has it as .xz), with its figures beside it as
JSON. Matrices are trained with Muon (Jordan et al. 2024), the rest with AdamW; the rate falls in a
line to zero over the last half.

Needs `pip install 'leangen[export]'`; fixed seeds, on a GPU when there is one. It may be
interrupted: the next run goes on from the checkpoint in DIR.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama import Llama, Shape
from shared import DEVICE, parameters, write_card
from tokenizers import Tokenizer, models, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.console import progress_bar, say
from leangen.store import Store

END = "<|end|>"  # begins and ends every molecule
SHAPE = Shape(vocab=1024)
BATCH, POOL = 128, 16  # molecules of a step, and steps whose molecules are sorted by length
WARMUP, MUON_RATE, ADAM_RATE = 50, 0.02, 3e-3
NOTHING = -100  # where there is nothing to predict
Tokens = np.ndarray[Any, np.dtype[np.int16]]


def molecules(part: str) -> list[str]:
    """The SMILES strings of `train` or `test`."""
    folder = Store().data("molecules").parent
    with gzip.open(folder / f"{part}.csv.gz", "rt", encoding="utf-8") as file:
        return [line.split(",")[0].strip() for line in file][1:]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """BPE over the whole string: a GGUF's SentencePiece, which splits nothing beforehand.

    Bracketed atoms, rings and branches then fall into pieces that are common in molecules: 12 of
    them on average, of 36 characters.
    """
    tokenizer = Tokenizer(models.BPE())
    trainer = trainers.BpeTrainer(vocab_size=SHAPE.vocab, special_tokens=[END], show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    content = json.loads(tokenizer.to_str())["model"]
    vocab, scores = content["vocab"], scores_of(content)
    cuts = [(piece, i) for piece in vocab if piece != END for i in range(1, len(piece))]
    pairs = [(piece[:i], piece[i:]) for piece, i in cuts]
    known = [pair for pair in pairs if pair[0] in vocab and pair[1] in vocab]
    known.sort(key=lambda pair: (-scores["".join(pair)], vocab[pair[0]], vocab[pair[1]]))
    return Tokenizer(models.BPE(vocab=vocab, merges=known))  # as SentencePiece merges: by score


def scores_of(content: dict[str, Any]) -> dict[str, float]:
    """A piece's score: minus the rank of the merge that makes it."""
    return {"".join(merge): -float(i) for i, merge in enumerate(content["merges"], 1)}


def encode(tokenizer: Tokenizer, texts: Sequence[str]) -> list[Tokens]:
    """The tokens of each molecule, without END."""
    rows: list[Tokens] = []
    for start in range(0, len(texts), 10_000):  # all at once would take gigabytes
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + 10_000]))
        rows.extend(np.array(row.ids, np.int16) for row in encoded)
    return rows


def padded(rows: Sequence[Sequence[int] | Tokens]) -> tuple[Tensor, Tensor]:
    """What the model reads and what it shall say, [n, t]: END, the molecule, END."""
    length = max(len(row) for row in rows) + 1
    inputs = np.zeros((len(rows), length), np.int64)
    targets = np.full((len(rows), length), NOTHING)
    for i, row in enumerate(rows):
        inputs[i, 1 : len(row) + 1] = row
        targets[i, : len(row)] = row
        targets[i, len(row)] = 0
    return torch.from_numpy(inputs).to(DEVICE), torch.from_numpy(targets).to(DEVICE)


def batches(lengths: np.ndarray[Any, Any], first: int) -> Iterator[np.ndarray[Any, Any]]:
    """Rows of each step from `first` on: molecules of nearly one length, so that few pads run."""
    each = len(lengths) // (BATCH * POOL)
    step = first
    while True:
        epoch, pool = divmod(step // POOL, each)
        order = np.random.default_rng(epoch).permutation(len(lengths))
        while pool < each:
            rows = order[pool * BATCH * POOL :][: BATCH * POOL]
            rows = rows[np.argsort(lengths[rows], kind="stable")].reshape(POOL, BATCH)
            shuffled = rows[np.random.default_rng((epoch, pool)).permutation(POOL)]
            yield from shuffled[step % POOL :]
            step += POOL - step % POOL
            pool += 1


def optimizers(model: nn.Module) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms."""
    named = dict(model.named_parameters())
    matrices = {name: weight for name, weight in named.items() if weight.ndim == 2}
    matrices.pop("token_embd.weight")
    others = [weight for name, weight in named.items() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: Llama, rows: Sequence[Tokens], steps: int, checkpoint: Path
) -> list[tuple[int, float]]:
    """The loss curve: (step, mean nats a token over the 50 steps before)."""
    optimizing = optimizers(model)
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizing]
    done, curve = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizing, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, curve = state["step"], state["curve"]
        say(f"going on from step {done}")
    total = 0.0
    drawn = batches(np.array([len(row) for row in rows]), done)
    with progress_bar() as progress:
        for step in range(done, steps):
            scale = min(1.0, (step + 1) / WARMUP, 2 * (steps - step) / steps)
            for optimizer, rate in zip(optimizing, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
            inputs, targets = padded([rows[i] for i in next(drawn)])
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model(inputs)
            loss = F.cross_entropy(
                logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOTHING
            )
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for optimizer in optimizing:
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            total += float(loss.detach())
            if (step + 1) % 50 == 0 or step + 1 == steps:
                curve.append((step + 1, round(total / ((step % 50) + 1), 4)))
                total = 0.0
                state = {"model": model.state_dict(), "step": step + 1, "curve": curve}
                state["optimizers"] = [optimizer.state_dict() for optimizer in optimizing]
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
            progress(step + 1, steps, f"loss {float(loss.detach()):.3f}")
    return curve


@torch.no_grad()
def nats_per_molecule(model: Llama, rows: Sequence[Sequence[int] | Tokens]) -> np.ndarray[Any, Any]:
    """Negative log-likelihood of each molecule with its END, each alone in its context."""
    found = []
    for start in range(0, len(rows), 100):
        inputs, targets = padded(rows[start : start + 100])
        logits = model(inputs).float().transpose(1, 2)
        loss = F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="none")
        found.append(loss.sum(1).cpu().numpy())
    return np.concatenate(found)


def n_gram_nats(
    texts: Iterable[str], judged: Iterable[str], order: int = 10
) -> np.ndarray[Any, Any]:
    """The baseline: an interpolated n-gram of characters with Witten-Bell smoothing."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for text in texts:
        line = f"\n{text}\n"
        for i in range(1, len(line)):
            for start in range(max(0, i - order + 1), i + 1):
                counts[line[start:i]][line[i]] += 1
    totals = {context: counter.total() for context, counter in counts.items()}
    alphabet = len(counts[""])

    def probability(context: str, symbol: str) -> float:
        below = probability(context[1:], symbol) if context else 1 / (alphabet + 1)
        if context not in counts:
            return below
        kinds = len(counts[context])
        return (counts[context][symbol] + kinds * below) / (totals[context] + kinds)

    found = []
    for text in judged:
        line = f"\n{text}\n"
        found.append(
            -sum(
                math.log(probability(line[max(0, i - order + 1) : i], line[i]))
                for i in range(1, len(line))
            )
        )
    return np.array(found)


def write_gguf(path: Path, model: Llama, tokenizer: Tokenizer) -> None:
    """The model in fp16 (norms in fp32), rows of q and k in GGUF's order of rotary pairs."""
    shape = model.shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("SMILES LM")
    writer.add_license("MIT")
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.width)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.inner)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_dimension_count(shape.head_width)
    writer.add_rope_freq_base(shape.rope_base)
    writer.add_layer_norm_rms_eps(shape.norm_epsilon)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    write_tokenizer(writer, tokenizer)
    heads = {"attn_q": shape.heads, "attn_k": shape.kv_heads}
    for name, tensor in model.state_dict().items():
        values = tensor.float().cpu().numpy()
        for part, count in heads.items():
            if f"{part}.weight" in name:
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(name, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer) -> None:
    """BPE as SentencePiece: a piece's score is minus the rank of the merge that makes it."""
    content = json.loads(tokenizer.to_str())["model"]
    ranks = {"".join(merge): -float(i) for i, merge in enumerate(content["merges"], 1)}
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    unused = [f"<unused{i}>" for i in range(SHAPE.vocab - len(tokens))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list([*tokens, *unused])
    writer.add_token_scores([ranks.get(token, -1e6) for token in [*tokens, *unused]])
    normal = [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    writer.add_token_types(
        [gguf.TokenType.CONTROL, *normal, *[gguf.TokenType.UNUSED] * len(unused)]
    )
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)
    writer.add_add_space_prefix(False)


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=2600)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts, test = molecules("train"), molecules("test")
    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    judged = [test[i] for i in rng.choice(len(test), 2000, replace=False)]
    tokenizer = train_tokenizer(texts[:200_000])
    rows = encode(tokenizer, texts)
    say(f"{len(rows)} molecules; {args.steps * BATCH / len(rows):.2f} epochs")
    torch.manual_seed(0)
    model = Llama(SHAPE).to(DEVICE)
    curve = train(model, rows, args.steps, args.output / "checkpoint.pt")
    model.eval().half().float()  # judged as it is stored
    path = args.output / "smiles-lm.gguf"
    write_gguf(path, model, tokenizer)
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    path.with_name(path.name + ".xz").write_bytes(packed)
    own = nats_per_molecule(model, encode(tokenizer, judged))
    baseline = n_gram_nats(texts[:200_000], judged)
    card = {
        "parameters": parameters(model),
        "steps": args.steps,
        "molecules_seen": args.steps * BATCH,
        "tokens_a_molecule": round(float(np.mean([len(row) + 1 for row in rows])), 2),
        "test_nats_per_molecule": round(float(own.mean()), 3),
        "test_nats_per_molecule_se": round(float(own.std() / math.sqrt(len(own))), 3),
        "ten_gram_nats_per_molecule": round(float(baseline.mean()), 3),
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
