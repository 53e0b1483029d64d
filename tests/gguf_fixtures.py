"""Tiny random llama GGUF files, written with the `gguf` package."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
from gguf import GGML_QUANT_SIZES, quants
from gguf import GGMLQuantizationType as Type
from tokenizers import pre_tokenizers

TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
SPECIALS = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
MERGES = ["h e", "l l", "he ll", "hell o", "Ġ w", "Ġw o", "1 2", "r l", "rl d"]


@dataclass
class Tiny:
    """What the file is to contain; `types` maps a tensor's name to its ggml type (default F32)."""

    layers: int = 2
    width: int = 64
    mlp_width: int = 96
    heads: int = 4
    kv_heads: int = 2
    head_dim: int = 16
    context: int = 128
    tied: bool = True
    biases: bool = False
    rope_base: float = 10000.0
    rope_factors: np.ndarray | None = None
    linear_factor: float | None = None
    architecture: str = "llama"
    types: dict[str, str] = field(default_factory=dict)
    default_type: str = "F32"
    skip: tuple[str, ...] = ()
    extra: dict[str, np.ndarray] = field(default_factory=dict)
    metadata: dict[str, int | str] = field(default_factory=dict)
    template: str | None = TEMPLATE
    seed: int = 0

    @property
    def tokens(self) -> list[str]:
        """Special tokens, the 256 bytes, and the results of the merges."""
        return [
            *SPECIALS,
            *sorted(pre_tokenizers.ByteLevel.alphabet()),
            *(merge.replace(" ", "") for merge in MERGES),
        ]

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Every tensor's shape, rows first."""
        q, kv = self.heads * self.head_dim, self.kv_heads * self.head_dim
        vocab = len(self.tokens)
        shapes = {"token_embd": (vocab, self.width), "output_norm": (self.width,)}
        if not self.tied:
            shapes["output"] = (vocab, self.width)
        for i in range(self.layers):
            layer = {
                "attn_norm": (self.width,),
                "attn_q": (q, self.width),
                "attn_k": (kv, self.width),
                "attn_v": (kv, self.width),
                "attn_output": (self.width, q),
                "ffn_norm": (self.width,),
                "ffn_gate": (self.mlp_width, self.width),
                "ffn_up": (self.mlp_width, self.width),
                "ffn_down": (self.width, self.mlp_width),
            }
            shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        return shapes


def random_blocks(rng: np.random.Generator, shape: tuple[int, int], form: str) -> np.ndarray:
    """Random valid bytes of a block format whose values are about 1 / sqrt(k)."""
    block, size = GGML_QUANT_SIZES[Type[form]]
    n, k = shape
    data = rng.integers(0, 256, (n, k // block, size), dtype=np.uint8)
    halves = {"Q4_1": [0, 2], "Q5_1": [0, 2], "Q4_K": [0, 2], "Q5_K": [0, 2], "Q6_K": [208]}
    span = {
        "Q4_0": 8,
        "Q4_1": 8,
        "Q5_0": 16,
        "Q5_1": 16,
        "Q8_0": 128,
        "Q4_K": 500,
        "Q5_K": 1000,
        "Q6_K": 3000,
    }[form]
    for place in halves.get(form, [0]):
        value = rng.normal(size=(n, k // block, 1)) / np.sqrt(k) / span * 2
        data[:, :, place : place + 2] = value.astype(np.float16).view(np.uint8)
    return data.reshape(n, -1)


def write(path: Path, tiny: Tiny) -> Path:
    """Write the file; returns its path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(tiny.seed)
    writer = gguf.GGUFWriter(path, tiny.architecture)
    writer.add_block_count(tiny.layers)
    writer.add_context_length(tiny.context)
    writer.add_embedding_length(tiny.width)
    writer.add_feed_forward_length(tiny.mlp_width)
    writer.add_head_count(tiny.heads)
    writer.add_head_count_kv(tiny.kv_heads)
    writer.add_key_length(tiny.head_dim)
    writer.add_value_length(tiny.head_dim)
    writer.add_rope_dimension_count(tiny.head_dim)
    writer.add_rope_freq_base(tiny.rope_base)
    writer.add_layer_norm_rms_eps(1e-5)
    if tiny.linear_factor is not None:
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(tiny.linear_factor)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tiny.tokens)
    writer.add_token_merges(MERGES)
    writer.add_token_types([3] * len(SPECIALS) + [1] * (len(tiny.tokens) - len(SPECIALS)))
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_add_bos_token(False)
    if tiny.template is not None:
        writer.add_chat_template(tiny.template)
    for key, value in tiny.metadata.items():
        writer.kv_data[0].pop(key, None)
        (writer.add_string if isinstance(value, str) else writer.add_uint32)(key, value)
    for name, shape in tiny.shapes().items():
        if f"{name}.weight" in tiny.skip:
            continue
        if len(shape) == 1:
            gain = 1 + 0.2 * rng.normal(size=shape)
            writer.add_tensor(f"{name}.weight", gain.astype(np.float32))
            continue
        form = tiny.types.get(name, tiny.default_type)
        if form in ("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"):
            scale = 3.0 if name == "token_embd" else 1 / np.sqrt(shape[1])
            w = (rng.normal(size=shape) * scale).astype(np.float32)
            data = quants.quantize(w, Type[form])
        else:
            data = random_blocks(rng, shape, form)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=Type[form])
        if tiny.biases and name.startswith("blk"):
            bias = rng.normal(size=shape[0]).astype(np.float32)
            writer.add_tensor(f"{name}.bias", bias)
    if tiny.rope_factors is not None:
        writer.add_tensor("rope_freqs.weight", tiny.rope_factors.astype(np.float32))
    for name, array in tiny.extra.items():
        writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
