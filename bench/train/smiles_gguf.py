"""A llama of molecules as a GGUF in fp16, and back."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import gguf
import numpy as np
import torch
from llama import Llama, Shape
from tokenizers import Tokenizer


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
