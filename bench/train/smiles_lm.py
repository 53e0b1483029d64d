"""Train the catalog's smiles-lm: `python bench/train/smiles_lm.py -o DIR`

A llama-shaped decoder of 5.6M parameters on the 1.58M SMILES strings of MOSES (Polykovskiy et al.
2020), written as an fp16 GGUF that `leangen export` takes (the package has it as .xz), with its
figures beside it as JSON. AdamW over windows of all molecules in one row makes what is shipped.

`--steps 1200 300` adds a second stage: Muon (Jordan et al. 2024) over whole molecules and over the
model's own, with a reward where rdkit can read them. It made 90% of them valid in place of 87, at
0.6 nats a real molecule more, and so is left out.

Needs `pip install 'leangen[export]'`, and rdkit for the second stage; fixed seeds, on a GPU when
there is one. It may be interrupted: the next run goes on from the checkpoint in DIR.
`--begun FILE.gguf` leaves the first stage out and starts the second from a GGUF of this script.
"""

from __future__ import annotations

import argparse
import gzip
import json
import lzma
import math
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from llama import Llama, Shape
from shared import DEVICE, parameters, write_card
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.console import progress_bar, say
from leangen.store import Store

END = "<|end|>"  # begins and ends every molecule
SHAPE = Shape(vocab=512)
WINDOW, WINDOWS = 96, 64  # tokens of a window, and windows of a step of the first stage
BATCH, POOL = 64, 16  # molecules of a step, and steps whose molecules are sorted by length
OWN, DRAWN, REWARD = 32, 256, 3.0  # the model's own in a step, drawn at once, and their weight
WINDOW_RATE, MUON_RATE, ADAM_RATE = 3e-3, 0.01, 1e-3
NOTHING = -100  # where there is nothing to predict
Tokens = np.ndarray[Any, np.dtype[np.int16]]


def molecules(part: str) -> list[str]:
    """The SMILES strings of `train` or `test`."""
    folder = Store().data("molecules").parent
    with gzip.open(folder / f"{part}.csv.gz", "rt", encoding="utf-8") as file:
        return [line.split(",")[0].strip() for line in file][1:]


def train_tokenizer(texts: Sequence[str]) -> Tokenizer:
    """Byte-level BPE with GPT-2's splits, which is what a GGUF's pre-tokenizer `gpt-2` says."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(
        vocab_size=SHAPE.vocab,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


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


def window_loss(model: Llama, row: Tokens, step: int) -> Tensor:
    """Nats a token of windows of the row of all molecules, each after END."""
    starts = np.random.default_rng(step).integers(0, len(row) - WINDOW - 1, WINDOWS)
    windows = np.stack([row[i : i + WINDOW + 1] for i in starts]).astype(np.int64)
    tokens = torch.from_numpy(windows).to(DEVICE)
    return loss_of(model, tokens[:, :-1], tokens[:, 1:])


def loss_of(model: Llama, inputs: Tensor, targets: Tensor) -> Tensor:
    """Mean nats a token."""
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(inputs)
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), ignore_index=NOTHING)


def muon_and_adam(model: nn.Module, share: float = 1.0) -> list[torch.optim.Optimizer]:
    """Muon for the matrices of the layers, AdamW for embeddings and norms; a share of the rates."""
    named = dict(model.named_parameters())
    matrices = {name: weight for name, weight in named.items() if weight.ndim == 2}
    matrices.pop("token_embd.weight")
    others = [weight for name, weight in named.items() if name not in matrices]
    return [
        torch.optim.Muon(matrices.values(), lr=share * MUON_RATE, weight_decay=0.01),
        torch.optim.AdamW(others, lr=share * ADAM_RATE, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def train(
    model: Llama,
    optimizing: Sequence[torch.optim.Optimizer],
    loss_at: Callable[[int], Tensor],
    scale_at: Callable[[float], float],
    steps: int,
    checkpoint: Path,
) -> list[tuple[int, float]]:
    """The loss curve: (step, mean loss of the 50 steps before).

    `loss_at` is called with each step in turn, `scale_at` with the share of them that is done.
    """
    rates = [optimizer.param_groups[0]["lr"] for optimizer in optimizing]
    done, curve = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        for optimizer, saved in zip(optimizing, state["optimizers"], strict=True):
            optimizer.load_state_dict(saved)
        done, curve = state["step"], state["curve"]
        say(f"going on from step {done}")
    total, warm_up = 0.0, min(100, max(steps // 10, 1))
    with progress_bar() as progress:
        for step in range(done, steps):
            scale = min(1.0, (step + 1) / warm_up) * scale_at(step / steps)
            for optimizer, rate in zip(optimizing, rates, strict=True):
                optimizer.param_groups[0]["lr"] = rate * scale
            loss = loss_at(step)
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


def begin(
    model: Llama, rows: Sequence[Tokens], steps: int, folder: Path
) -> list[tuple[int, float]]:
    """The first stage: AdamW and half a cosine."""
    end = np.zeros(1, np.int16)
    row = np.concatenate([part for molecule in rows for part in (end, molecule)])
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=WINDOW_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    return train(
        model,
        [optimizer],
        lambda step: window_loss(model, row, step),
        lambda share: max(0.02, 0.5 + 0.5 * math.cos(math.pi * share)),
        steps,
        folder / "begun.pt",
    )


class Judged:
    """Molecules of the model's own, of which some are none: rdkit cannot read them.

    Beside the likelihood of real molecules, that of its own is raised where they are valid and
    lowered where not (REINFORCE, Williams 1992): by how far they are from the share that is valid.
    """

    def __init__(self, model: Llama, tokenizer: Tokenizer) -> None:
        from rdkit import Chem, RDLogger

        RDLogger.DisableLog("rdApp.*")
        self._parse = Chem.MolFromSmiles
        self._model, self._tokenizer = model, tokenizer
        self._drawn: list[list[int]] = []
        self._valid: list[float] = []

    def take(self, count: int, seed: int) -> tuple[list[list[int]], Tensor]:
        """So many of them, and the weight of each one's negative log-likelihood."""
        if len(self._drawn) < count:
            torch.manual_seed(seed)
            with torch.autocast(DEVICE, torch.bfloat16):
                drawn = self._model.draw(DRAWN, longest=60)
            self._drawn = [row for row in drawn if row]
            texts = ["".join(map(self._tokenizer.id_to_token, row)) for row in self._drawn]
            self._valid = [float(self._parse(text) is not None) for text in texts]
            self._share = sum(self._valid) / len(self._valid)
            say(f"step {seed}: {self._share:.1%} of {len(self._valid)} valid")
        rows, valid = self._drawn[:count], torch.tensor(self._valid[:count])
        del self._drawn[:count], self._valid[:count]
        return rows, valid - self._share


def finish(
    model: Llama, tokenizer: Tokenizer, rows: Sequence[Tokens], steps: int, folder: Path
) -> list[tuple[int, float]]:
    """The second stage: Muon, whose rate falls in a line to zero; real molecules and its own."""
    lengths = np.array([len(row) for row in rows])
    drawn: list[Iterator[Any]] = []
    judged = Judged(model, tokenizer)

    def loss_at(step: int) -> Tensor:
        if not drawn:  # from where a run goes on
            drawn.append(batches(lengths, step))
        own, weights = judged.take(OWN, step)
        real = [rows[i] for i in next(drawn[0])]
        reward = (weights * nats_of(model, own)).sum()
        return (nats_of(model, real).sum() + REWARD * reward) / sum(len(row) + 1 for row in real)

    return train(
        model,
        muon_and_adam(model),
        loss_at,
        lambda share: 1 - share,
        steps,
        folder / "checkpoint.pt",
    )


@torch.no_grad()
def read_gguf(path: Path, model: Llama) -> None:
    """Take the weights of a GGUF that `write_gguf` wrote; tokens that it lacks stay as they are."""
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors}
    for name, target in model.state_dict().items():
        values = np.array(weights[name], np.float32).reshape(-1, *target.shape[1:])
        for part, count in heads_of(model.shape).items():
            if f"{part}.weight" in name:
                pairs = values.reshape(count, -1, 2, values.shape[1])
                values = pairs.swapaxes(1, 2).reshape(values.shape)
        target[: len(values)].copy_(torch.from_numpy(values))


def heads_of(shape: Shape) -> dict[str, int]:
    """The matrices whose rows a GGUF has in another order, and their heads."""
    return {"attn_q": shape.heads, "attn_k": shape.kv_heads}


def nats_of(model: Llama, rows: Sequence[Sequence[int] | Tokens]) -> Tensor:
    """Negative log-likelihood of each molecule with its END."""
    inputs, targets = padded(rows)
    with torch.autocast(DEVICE, torch.bfloat16):
        logits = model(inputs).float().transpose(1, 2)
    return F.cross_entropy(logits, targets, ignore_index=NOTHING, reduction="none").sum(1)


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


def write_gguf(
    path: Path,
    model: Llama,
    tokenizer: Tokenizer,
    named: Sequence[str] = (),
    extra: Mapping[str, str] | None = None,
) -> None:
    """The model in fp16 (norms in fp32), rows of q and k in GGUF's order of rotary pairs.

    `named` are control tokens after those of the tokenizer, `extra` keys that it has beside.
    """
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
    write_tokenizer(writer, tokenizer, named)
    for key, value in (extra or {}).items():
        writer.add_string(key, value)
    for name, tensor in model.state_dict().items():
        values = tensor.float().cpu().numpy()
        for part, count in heads_of(shape).items():
            if f"{part}.weight" in name:
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        writer.add_tensor(name, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_tokenizer(writer: gguf.GGUFWriter, tokenizer: Tokenizer, named: Sequence[str]) -> None:
    """The tokens and merges."""
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    control, normal = gguf.TokenType.CONTROL, [gguf.TokenType.NORMAL] * (len(tokens) - 1)
    writer.add_token_list([*tokens, *named])
    writer.add_token_types([control, *normal, *[control] * len(named)])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, nargs=2, default=(1200, 0), metavar="N")
    parser.add_argument("--begun", type=Path, metavar="FILE.gguf")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts, test = molecules("train"), molecules("test")
    rng = np.random.default_rng(0)
    texts = [texts[i] for i in rng.permutation(len(texts))]
    judged = [test[i] for i in rng.choice(len(test), 2000, replace=False)]
    tokenizer = train_tokenizer(texts[:200_000])
    rows = encode(tokenizer, texts)
    torch.manual_seed(0)
    model = Llama(SHAPE).to(DEVICE)
    first, second = args.steps
    curves = []
    if args.begun is not None:
        read_gguf(args.begun, model)
        say(f"begins at {nats_per_molecule(model, encode(tokenizer, judged)).mean():.3f} nats")
    else:
        curves.append(begin(model, rows, first, args.output))
    if second:
        curves.append(finish(model, tokenizer, rows, second, args.output))
    model.eval().half().float()  # judged as it is stored
    path = args.output / "smiles-lm.gguf"
    write_gguf(path, model, tokenizer)
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    path.with_name(path.name + ".xz").write_bytes(packed)
    own = nats_per_molecule(model, encode(tokenizer, judged))
    baseline = n_gram_nats(texts[:30_000], judged)
    card = {
        "parameters": parameters(model),
        "steps": args.steps,
        "tokens_of_the_first_stage": first * WINDOWS * WINDOW,
        "molecules_of_the_second_stage": second * BATCH,
        "tokens_a_molecule": round(float(np.mean([len(row) + 1 for row in rows])), 2),
        "test_nats_per_molecule": round(float(own.mean()), 3),
        "test_nats_per_molecule_se": round(float(own.std() / math.sqrt(len(own))), 3),
        "ten_gram_nats_per_molecule": round(float(baseline.mean()), 3),
        "loss_curve": curves,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
