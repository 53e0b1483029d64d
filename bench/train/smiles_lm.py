"""Train the full-precision language model of molecules: `python bench/train/smiles_lm.py -o DIR`

A llama-shaped decoder of 5.6M parameters on the 1.58M SMILES strings of MOSES (Polykovskiy et al.
2020), written as an fp16 GGUF that `leangen export` takes (the package has it as .xz), with its
figures beside it as JSON.
Needs `pip install 'leangen[export]'`; fixed seeds, on a GPU when there is one. It may be
interrupted: the next run goes on from the checkpoint in DIR.
"""

from __future__ import annotations

import argparse
import gzip
import json
import math
from collections import Counter, defaultdict
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM

from leangen.console import progress_bar, say
from leangen.store import Store

END = "<|end|>"  # begins and ends every molecule
CONTEXT, BATCH, WARMUP, LEARNING_RATE = 96, 64, 100, 3e-3
CONFIG = LlamaConfig(
    vocab_size=512,
    hidden_size=256,
    intermediate_size=640,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    max_position_embeddings=256,
    tie_word_embeddings=True,
    rms_norm_eps=1e-5,
    bos_token_id=0,
    eos_token_id=0,
)
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


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
        vocab_size=CONFIG.vocab_size,
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def token_stream(tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray[Any, Any]:
    """All molecules in one row, each after END."""
    parts = []
    for start in range(0, len(texts), 10_000):  # all at once would take gigabytes
        encoded = tokenizer.encode_batch_fast(list(texts[start : start + 10_000]))
        parts.append(np.array([token for row in encoded for token in (0, *row.ids)], np.int16))
    return np.concatenate(parts)


def train(
    model: LlamaForCausalLM, stream: np.ndarray[Any, Any], steps: int, checkpoint: Path
) -> list[tuple[int, float]]:
    """Adam with a warm-up and a cosine; returns (step, mean loss of the 50 steps before)."""
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=LEARNING_RATE, betas=(0.9, 0.95), weight_decay=0.1
    )
    done, curve = 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        done, curve = state["step"], state["curve"]
        say(f"going on from step {done}")
    total = 0.0
    with progress_bar() as progress:
        for step in range(done, steps):
            fraction = (step - WARMUP) / max(steps - WARMUP, 1)
            rate = (
                (step + 1) / WARMUP if step < WARMUP else 0.5 + 0.5 * math.cos(math.pi * fraction)
            )
            for group in optimizer.param_groups:
                group["lr"] = LEARNING_RATE * max(rate, 0.02)
            starts = np.random.default_rng(step).integers(0, len(stream) - CONTEXT - 1, BATCH)
            rows = np.stack([stream[i : i + CONTEXT + 1] for i in starts]).astype(np.int64)
            tokens = torch.from_numpy(rows).to(DEVICE)
            with torch.autocast(DEVICE, torch.bfloat16):
                logits = model(tokens[:, :-1]).logits
            loss = torch.nn.functional.cross_entropy(
                logits.float().flatten(0, 1), tokens[:, 1:].flatten()
            )
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            total += float(loss.detach())
            if (step + 1) % 50 == 0 or step + 1 == steps:
                curve.append((step + 1, round(total / ((step % 50) + 1), 4)))
                total = 0.0
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                torch.save(
                    state | {"step": step + 1, "curve": curve}, checkpoint.with_suffix(".new")
                )
                checkpoint.with_suffix(".new").replace(checkpoint)
            progress(step + 1, steps, f"loss {float(loss.detach()):.3f}")
    return curve


@torch.no_grad()
def nats_per_molecule(
    model: LlamaForCausalLM, rows: Iterable[Sequence[int]]
) -> np.ndarray[Any, Any]:
    """Negative log-likelihood of each molecule with its END, each alone in its context."""
    found = []
    for row in rows:
        tokens = torch.tensor([[0, *row, 0]], device=DEVICE)
        logits = model(tokens[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits[0], tokens[0, 1:], reduction="sum")
        found.append(float(loss))
    return np.array(found)


def n_gram_nats(
    stream: np.ndarray[Any, Any], rows: Iterable[Sequence[int]], order: int = 5
) -> np.ndarray[Any, Any]:
    """The baseline: an interpolated n-gram with Witten-Bell smoothing over the same tokens."""
    counts: dict[tuple[int, ...], Counter[int]] = defaultdict(Counter)
    history: list[int] = []
    for token in stream.tolist():
        for n in range(order):
            counts[tuple(history[len(history) - n :])][token] += 1
        history = [0] if token == 0 else [*history, token][1 - order :]
    totals = {context: counter.total() for context, counter in counts.items()}

    def probability(context: tuple[int, ...], token: int) -> float:
        below = 1 / CONFIG.vocab_size if not context else probability(context[1:], token)
        if context not in counts:
            return below
        kinds = len(counts[context])
        return (counts[context][token] + kinds * below) / (totals[context] + kinds)

    found = []
    for row in rows:
        history, nats = [0], 0.0
        for token in (*row, 0):
            nats -= math.log(probability(tuple(history), token))
            history = [*history, token][1 - order :]
        found.append(nats)
    return np.array(found)


def write_gguf(path: Path, model: LlamaForCausalLM, tokenizer: Tokenizer) -> None:
    """The model in fp16 (norms in fp32), rows of q and k in GGUF's order of rotary pairs."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("SMILES LM 5.6M")
    writer.add_license("MIT")
    writer.add_context_length(CONFIG.max_position_embeddings)
    writer.add_embedding_length(CONFIG.hidden_size)
    writer.add_block_count(CONFIG.num_hidden_layers)
    writer.add_feed_forward_length(CONFIG.intermediate_size)
    writer.add_head_count(CONFIG.num_attention_heads)
    writer.add_head_count_kv(CONFIG.num_key_value_heads)
    writer.add_rope_dimension_count(CONFIG.hidden_size // CONFIG.num_attention_heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(CONFIG.rms_norm_eps)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16)
    content = json.loads(tokenizer.to_str())["model"]
    tokens = sorted(content["vocab"], key=content["vocab"].get)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([gguf.TokenType.CONTROL, *[gguf.TokenType.NORMAL] * (len(tokens) - 1)])
    writer.add_token_merges([" ".join(merge) for merge in content["merges"]])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(0)
    writer.add_add_bos_token(True)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, CONFIG.num_hidden_layers)
    heads = {"q_proj": CONFIG.num_attention_heads, "k_proj": CONFIG.num_key_value_heads}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight":
            continue  # tied
        values = tensor.float().cpu().numpy()
        for part, count in heads.items():
            if part in name:
                halves = values.reshape(count, 2, -1, values.shape[1])
                values = halves.swapaxes(1, 2).reshape(values.shape)
        stored = names.get_name(name, try_suffixes=(".weight",))
        writer.add_tensor(stored, values if values.ndim == 1 else values.astype(np.float16))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def main() -> None:
    """Train, evaluate, write."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--steps", type=int, default=1200)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    texts, test = molecules("train"), molecules("test")
    rng = np.random.default_rng(0)
    order = rng.permutation(len(texts))
    tokenizer = train_tokenizer([texts[i] for i in order[:200_000]])
    stream = token_stream(tokenizer, [texts[i] for i in order])
    say(f"{len(stream) / 1e6:.1f}M tokens; {args.steps * BATCH * CONTEXT / len(stream):.2f} epochs")
    torch.manual_seed(0)
    model = LlamaForCausalLM(CONFIG).to(DEVICE)
    curve = train(model, stream, args.steps, args.output / "checkpoint.pt")
    model.eval().half().float()  # judged as it is stored
    write_gguf(args.output / "smiles-lm.gguf", model, tokenizer)
    rows = [tokenizer.encode(test[i]).ids for i in rng.choice(len(test), 2000, replace=False)]
    own, baseline = nats_per_molecule(model, rows), n_gram_nats(stream[:4_000_000], rows)
    card = {
        "parameters": sum(weight.numel() for weight in model.parameters()),
        "steps": args.steps,
        "tokens_seen": args.steps * BATCH * CONTEXT,
        "test_nats_per_molecule": round(float(own.mean()), 3),
        "test_nats_per_molecule_se": round(float(own.std() / math.sqrt(len(own))), 3),
        "five_gram_nats_per_molecule": round(float(baseline.mean()), 3),
        "loss_curve": curve,
    }
    (args.output / "card.json").write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in card.items() if key != "loss_curve"}))


if __name__ == "__main__":
    main()
