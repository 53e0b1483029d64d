"""The llama shape for training on a CPU: short rows, attention written out, norms in one pass.

transformers' own runs these sizes at two thirds of the speed: a fused attention costs more than it
saves on rows of a few dozen tokens, and RMSNorm makes five passes.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """The sizes of a llama; embeddings are tied."""

    vocab: int
    width: int = 256
    layers: int = 8
    heads: int = 4
    kv_heads: int = 2
    inner: int = 640
    context: int = 256
    norm_epsilon: float = 1e-5
    rope_base: float = 10_000.0

    @property
    def head_width(self) -> int:
        """Numbers a head looks at."""
        return self.width // self.heads


class Norm(nn.Module):
    """RMSNorm (Zhang and Sennrich 2019)."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(shape.width))
        self.epsilon = shape.norm_epsilon

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square() / x.shape[-1] + self.epsilon)
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Layer(nn.Module):
    """Attention over what came before, then SwiGLU; names of weights as in a GGUF."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        width, keys = shape.width, shape.kv_heads * shape.head_width
        sizes = {"attn_q": (width, width), "attn_k": (width, keys), "attn_v": (width, keys)}
        sizes |= {"attn_output": (width, width), "ffn_gate": (width, shape.inner)}
        sizes |= {"ffn_up": (width, shape.inner), "ffn_down": (shape.inner, width)}
        for name, (inner, outer) in sizes.items():
            self.add_module(name, nn.Linear(inner, outer, bias=False))
        self.attn_norm, self.ffn_norm = Norm(shape), Norm(shape)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, mask: Tensor, past: list[Tensor] | None = None
    ) -> Tensor:
        n, length, width = x.shape
        groups = self.shape.heads // self.shape.kv_heads
        y = self.attn_norm(x)
        q, k, v = (
            project(y).view(n, length, -1, self.shape.head_width).transpose(1, 2)
            for project in (self.attn_q, self.attn_k, self.attn_v)
        )
        q, k = turned(q, cos, sin), turned(k, cos, sin)
        if past is not None:
            if past:
                k, v = torch.cat([past[0], k], 2), torch.cat([past[1], v], 2)
            past[:] = k, v
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
        scores = q @ k.transpose(-1, -2) * self.shape.head_width**-0.5 + mask
        y = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.attn_output(y.transpose(1, 2).reshape(n, length, width))
        y = self.ffn_norm(x)
        return x + self.ffn_down(F.silu(self.ffn_gate(y)) * self.ffn_up(y))


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021), each pair half a head apart."""
    first, second = x.chunk(2, -1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)


class Llama(nn.Module):
    """Tokens [n, t] to logits [n, t, vocab], each of the token after."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.token_embd = nn.Embedding(shape.vocab, shape.width)
        self.blk = nn.ModuleList(Layer(shape) for _ in range(shape.layers))
        self.output_norm = Norm(shape)
        for weight in self.parameters():
            if weight.ndim == 2:
                nn.init.normal_(weight, std=0.02)
        exponents = torch.arange(0, shape.head_width, 2) / shape.head_width
        angles = torch.arange(shape.context)[:, None] * shape.rope_base**-exponents
        self.register_buffer("cos", angles.cos(), persistent=False)
        self.register_buffer("sin", angles.sin(), persistent=False)

    def hidden(self, tokens: Tensor) -> Tensor:
        """What the head reads, [n, t, width]."""
        x = self.token_embd(tokens)
        if torch.is_autocast_enabled(x.device.type):
            x = x.bfloat16()
        length = tokens.shape[1]
        cos, sin = self.cos[:length].to(x.dtype), self.sin[:length].to(x.dtype)
        mask = torch.full((length, length), -1e9, dtype=x.dtype, device=x.device).triu(1)
        for layer in self.blk:
            x = layer(x, cos, sin, mask)
        return self.output_norm(x)

    @torch.no_grad()
    def draw(self, count: int, longest: int) -> list[list[int]]:
        """Sequences between two tokens 0, at temperature 1; what has not ended by then is cut."""
        weight = self.token_embd.weight
        rows: list[list[int]] = [[] for _ in range(count)]
        going = torch.arange(count, device=weight.device)
        token = torch.zeros_like(going)
        pasts: list[list[Tensor]] = [[] for _ in self.blk]
        mask = torch.zeros(1, 1, dtype=weight.dtype, device=weight.device)
        for place in range(longest):
            x = self.token_embd(token[:, None])
            cos, sin = (table[place : place + 1].to(x.dtype) for table in (self.cos, self.sin))
            for layer, past in zip(self.blk, pasts, strict=True):
                x = layer(x, cos, sin, mask, past)
            logits = F.linear(self.output_norm(x), weight)[:, 0].float()
            token = torch.multinomial(logits.softmax(-1), 1)[:, 0]
            kept = token.nonzero()[:, 0]
            if len(kept) < len(token):  # those that ended cost nothing more
                going, token = going[kept], token[kept]
                pasts = [[each[kept] for each in past] for past in pasts]
            if not len(going):
                break
            for i, chosen in zip(going.tolist(), token.tolist(), strict=True):
                rows[i].append(chosen)
        return rows

    def forward(self, tokens: Tensor) -> Tensor:
        return F.linear(self.hidden(tokens), self.token_embd.weight)
