"""A language model of a billion parameters: export, quantizing and decoding, beside torch.

    python bench/llama_1b.py make DIR          a Llama of 1.24B random weights, fp16 safetensors
    python bench/llama_1b.py export DIR        to DIR/fp32
    python bench/llama_1b.py quantize DIR      to DIR/int4
    python bench/llama_1b.py gptq DIR          the same by GPTQ at g128; goes on if killed
    python bench/llama_1b.py decode DIR int4   leangen
    python bench/llama_1b.py torch DIR bfloat16

Each prints one JSON line with its seconds and the peak memory of its process. The shape is that of
Llama-3.2-1B (16 layers, width 2048, 32 heads on 8, MLP 8192, vocabulary 128,256, tied head).
Random weights take as long as trained ones; what they say is noise.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from leangen import clock, exporters, host
from leangen.bundle import open_bundle
from leangen.engine import Engine
from leangen.quantize import quantize
from leangen.session import Session

CONFIG = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "head_dim": 64,
    "max_position_embeddings": 4096,
    "rope_theta": 500_000.0,
    "rms_norm_eps": 1e-5,
    "tie_word_embeddings": True,
    "hidden_act": "silu",
    "bos_token_id": 1,
    "eos_token_id": 2,
}
PROMPT = 64
NEW = 24
CALIBRATION = (8, 256)


def make(folder: Path) -> dict[str, Any]:
    """Write the checkpoint, one file a layer, so that little is in memory."""
    from safetensors.numpy import save_file
    from tokenizers import Tokenizer, models

    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(0)
    width, hidden, kv = 2048, 8192, 512
    pool = rng.standard_normal(1 << 24, np.float32)  # drawing all of them would take a minute

    def matrix(rows: int, columns: int) -> np.ndarray:
        start = int(rng.integers(len(pool) // 2))
        values = np.resize(pool[start:], rows * columns).reshape(rows, columns)
        return (values / np.float32(columns**0.5)).astype(np.float16)

    ones = np.ones(width, np.float16)
    index: dict[str, str] = {}

    def write(file: str, tensors: dict[str, np.ndarray]) -> None:
        save_file(tensors, folder / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))

    write(
        "model-00.safetensors",
        {"model.embed_tokens.weight": matrix(128_256, width), "model.norm.weight": ones},
    )
    for layer in range(16):
        stem = f"model.layers.{layer}"
        write(
            f"model-{layer + 1:02}.safetensors",
            {
                f"{stem}.self_attn.q_proj.weight": matrix(width, width),
                f"{stem}.self_attn.k_proj.weight": matrix(kv, width),
                f"{stem}.self_attn.v_proj.weight": matrix(kv, width),
                f"{stem}.self_attn.o_proj.weight": matrix(width, width),
                f"{stem}.mlp.gate_proj.weight": matrix(hidden, width),
                f"{stem}.mlp.up_proj.weight": matrix(hidden, width),
                f"{stem}.mlp.down_proj.weight": matrix(width, hidden),
                f"{stem}.input_layernorm.weight": ones,
                f"{stem}.post_attention_layernorm.weight": ones,
            },
        )
    (folder / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": index})
    )
    (folder / "config.json").write_text(json.dumps(CONFIG))
    tokenizer = Tokenizer(models.WordLevel({f"w{i}": i for i in range(100)}, unk_token="w0"))
    tokenizer.save(str(folder / "tokenizer.json"))
    return {"bytes": sum(file.stat().st_size for file in folder.glob("*.safetensors"))}


def export(folder: Path) -> dict[str, Any]:
    """Export to fp32."""
    bundle = exporters.export(folder, folder / "fp32", replace=True)
    return {"bytes": bundle.size_bytes}


def to_int4(folder: Path) -> dict[str, Any]:
    """Quantize to int4."""
    bundle = quantize(open_bundle(folder / "fp32"), "int4", folder / "int4", replace=True)
    return {"bytes": bundle.size_bytes}


def gptq(folder: Path) -> dict[str, Any]:
    """Quantize by GPTQ on `CALIBRATION` tokens; the layers that a killed run has done are kept."""
    tokens = np.random.default_rng(2).integers(3, 128_000, CALIBRATION)
    np.save(folder / "tokens.npy", tokens)
    scheme = "int4-g128-gptq"
    bundle = quantize(
        open_bundle(folder / "fp32"),
        scheme,
        folder / scheme,
        data=folder / "tokens.npy",
        replace=True,
        progress=lambda done, total, what: print(what, file=sys.stderr, flush=True),
    )
    return {"bytes": bundle.size_bytes}


def decode(folder: Path, scheme: str) -> dict[str, Any]:
    """Median seconds of a decoded token; prompts of `PROMPT` tokens; joules as the receipt says."""
    engine = Engine(Session(open_bundle(folder / scheme)), baseline_s=0)
    prompt = np.random.default_rng(1).integers(3, 128_000, PROMPT).tolist()
    engine.generate(tokens=prompt, max_new_tokens=2, ignore_eos=True)
    receipt = engine.generate(tokens=prompt, max_new_tokens=NEW, ignore_eos=True).receipt
    energy = receipt.energy
    return {
        "prefill_s": receipt.latency.ttft_s,
        "token_s": receipt.latency.step_p50_s,
        "token_p95_s": receipt.latency.step_p95_s,
        "joules_per_token": energy.per_unit_j,
        "energy_source": energy.source,
        "kernels": receipt.runtime.kernels,
    }


def torch_decode(folder: Path, dtype: str) -> dict[str, Any]:
    """The same with transformers on torch."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(2)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype))
    ids = torch.tensor([np.random.default_rng(1).integers(3, 128_000, PROMPT).tolist()])
    seconds: list[float] = []
    with torch.inference_mode():
        past = None
        for _ in range(NEW):
            begin_ns = clock.monotonic_ns()
            out = model(ids, past_key_values=past, use_cache=True, logits_to_keep=1)
            past, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            seconds.append((clock.monotonic_ns() - begin_ns) / 1e9)
    later = sorted(seconds[1:])
    return {
        "prefill_s": seconds[0],
        "token_s": statistics.median(later),
        "token_p95_s": later[int(0.95 * len(later))],
    }


def main(arguments: list[str] | None = None) -> int:
    """Run one part; print what it cost."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("part", choices=("make", "export", "quantize", "gptq", "decode", "torch"))
    parser.add_argument("folder", type=Path)
    parser.add_argument("form", nargs="?", default="int4", help="decode: scheme; torch: dtype")
    options = parser.parse_args(arguments)
    parts: dict[str, Callable[[], dict[str, Any]]] = {
        "make": lambda: make(options.folder),
        "export": lambda: export(options.folder),
        "quantize": lambda: to_int4(options.folder),
        "gptq": lambda: gptq(options.folder),
        "decode": lambda: decode(options.folder, options.form),
        "torch": lambda: torch_decode(options.folder, options.form),
    }
    begin_ns = clock.monotonic_ns()
    found = parts[options.part]()
    total_s = (clock.monotonic_ns() - begin_ns) / 1e9
    print(
        json.dumps(
            {"part": options.part, "form": options.form, **found, "total_s": total_s}
            | {"peak_rss_bytes": host.peak_rss_bytes()}
        )
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
