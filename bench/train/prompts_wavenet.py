"""Train the catalog's prompts-wavenet: `python bench/train/prompts_wavenet.py -o DIR`

A WaveNet (van den Oord et al. 2016) of one voice: Allison Smith's English telephone prompts for
Asterisk (CC BY-SA 3.0), 8 kHz in 256 mu-law levels. Written as `leangen export` takes it, in a
.tar.xz. No text goes in, so what comes out is babble.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from prompts import (
    FOLDER,
    LEVELS,
    RATE_HZ,
    Array,
    adaptive_bits,
    histogram_bits,
    linear_bits,
    per_sample,
    prompts,
)
from safetensors.torch import save_file
from shared import DEVICE, pack, packed_size, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

KERNEL, DILATIONS = 4, (1, 4, 16, 64, 256) * 2
WIDTH, SKIP, END = 64, 128, 128
BATCH, CROP, RATE = 4, 4096, 2e-3
NOTICE = (
    "Learnt by leangen from English telephone prompts of Asterisk, (c) 2003-2010 Allison Smith "
    "(theivrvoice.com), with financial contributions by Digium. Weights and prompts: CC BY-SA 3.0, "
    "https://creativecommons.org/licenses/by-sa/3.0/"
)
HALF_LIFE = 16  # of the adaptive predictor's scale, in samples: of 16, 32, 64, 128 the best


class Taps(torch.autograd.Function):
    """Values [n, t, c] and those `dilation`, 2 `dilation`, ... earlier, [n, t, 4 c], the last last.

    Torch's own gradient of slices fills a tensor of zeros for each.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, dilation: int) -> Tensor:
        ctx.dilation = dilation
        seen = F.pad(x, (0, 0, (KERNEL - 1) * dilation, 0))
        return torch.cat([seen[:, at * dilation :][:, : x.shape[1]] for at in range(KERNEL)], 2)

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> tuple[Tensor, None]:
        *earlier, last = slopes.chunk(KERNEL, 2)
        total = last.clone(memory_format=torch.contiguous_format)
        for at, slope in enumerate(earlier):
            back = (KERNEL - 1 - at) * ctx.dilation
            total[:, :-back] += slope[:, back:]
        return total, None


class Gate(torch.autograd.Function):
    """Half of the channels, let through by the other half; the gradient in one piece."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        shaped, let = x.chunk(2, 2)
        shaped, let = torch.tanh(shaped), torch.sigmoid(let)
        ctx.save_for_backward(shaped, let)
        return shaped * let

    @staticmethod
    def backward(ctx: Any, slopes: Tensor) -> Tensor:
        shaped, let = ctx.saved_tensors
        slopes = slopes * let
        both = slopes.new_empty(*slopes.shape[:2], 2 * slopes.shape[2])
        torch.mul(slopes, 1 - shaped * shaped, out=both[..., : slopes.shape[2]])
        torch.mul(slopes.mul_(shaped), 1 - let, out=both[..., slopes.shape[2] :])
        return both


class Layer(nn.Module):
    """A dilated causal convolution, gated: what the end reads, and what the next layer does.

    Channels last and a matrix product for all taps: on a CPU half the time of a convolution.
    """

    def __init__(self, dilation: int) -> None:
        super().__init__()
        self.dilation = dilation
        self.taps = nn.Linear(KERNEL * WIDTH, 2 * WIDTH)
        self.residual = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        y = Gate.apply(self.taps(Taps.apply(x, self.dilation)))
        return y, x + self.residual(y)


class WaveNet(nn.Module):
    """Levels [n, t] to logits [n, t, 256] of each, which see the 2,047 levels before it."""

    def __init__(self) -> None:
        super().__init__()
        self.start = nn.Embedding(LEVELS, WIDTH)
        self.layers = nn.ModuleList(Layer(dilation) for dilation in DILATIONS)
        self.skip = nn.Linear(len(DILATIONS) * WIDTH, SKIP)
        self.end_1, self.end_2 = nn.Linear(SKIP, END), nn.Linear(END, LEVELS)
        with torch.no_grad():  # levels that are near each other begin alike
            self.start.weight.copy_(waves(WIDTH))
            self.end_2.weight.copy_(waves(END) / END**0.5)
            self.end_2.bias.zero_()

    def forward(self, levels: Tensor) -> Tensor:
        silence = torch.full_like(levels[:, :1], LEVELS // 2)
        x, seen = self.start(torch.cat([silence, levels[:, :-1]], 1)), []
        x = x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x
        for layer in self.layers:
            y, x = layer(x)
            seen.append(y)
        return self.end_2(F.relu(self.end_1(F.relu(self.skip(torch.cat(seen, 2))))))

    def tensors(self) -> dict[str, Tensor]:
        """The weights as convolutions, [out, in, taps], under the names that `export` reads."""
        found = {"start_conv.weight": self.start.weight.T[..., None]}
        skips = self.skip.weight[..., None].split(WIDTH, 1)
        for i, (layer, skip) in enumerate(zip(self.layers, skips, strict=True)):
            taps = layer.taps.weight.unflatten(1, (KERNEL, WIDTH)).mT
            for name, weight, bias in zip(
                ("filter", "gate"), taps.chunk(2), layer.taps.bias.chunk(2), strict=True
            ):
                found |= {f"{name}_convs.{i}.weight": weight, f"{name}_convs.{i}.bias": bias}
            found[f"residual_convs.{i}.weight"] = layer.residual.weight[..., None]
            found[f"residual_convs.{i}.bias"] = layer.residual.bias
            found[f"skip_convs.{i}.weight"] = skip
        found["skip_convs.0.bias"] = self.skip.bias  # once: they are added up
        for i, layer in enumerate((self.end_1, self.end_2), 1):
            found |= {f"end_conv_{i}.weight": layer.weight[..., None]}
            found |= {f"end_conv_{i}.bias": layer.bias}
        return found


def waves(count: int) -> Tensor:
    """Sines of the levels [256, count], from an eighth of a wave over all of them to sixteen."""
    places = torch.linspace(-0.5, 0.5, LEVELS)[:, None]
    waves = torch.logspace(-3, 4, count, base=2.0)
    return torch.sin(2 * torch.pi * (places * waves + torch.rand(count)))


@torch.no_grad()
def model_bits(model: WaveNet, test: Sequence[Array]) -> list[Array]:
    """Bits of each sample of whole files."""
    found = []
    for levels in test:
        x = torch.from_numpy(levels)
        loss = F.cross_entropy(model(x[None])[0], x, reduction="none")
        found.append(loss.double().numpy() / np.log(2))
    return found


def save(model: WaveNet, folder: Path) -> None:
    """The folder that `leangen export` takes, in fp16, and a .tar.xz of it."""
    folder.mkdir(exist_ok=True)
    tensors = {name: x.detach().half().contiguous() for name, x in model.tensors().items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    said = {"model_type": "wavenet", "sample_rate_hz": RATE_HZ, "levels": LEVELS}
    said |= {"kernel": KERNEL, "dilations": DILATIONS, "notice": NOTICE}
    (folder / "config.json").write_text(json.dumps(said, indent=1), encoding="utf-8")
    pack(folder)


def main() -> None:
    """Train, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, default=FOLDER, metavar="DIR", help="the prompts")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    learnt, held_out = prompts(args.data)
    args.output.mkdir(parents=True, exist_ok=True)
    sound = torch.from_numpy(np.concatenate(learnt))
    torch.manual_seed(0)
    model = WaveNet().to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        starts = rng.integers(0, len(sound) - CROP, BATCH)
        levels = torch.stack([sound[start : start + CROP] for start in starts]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(levels)
        return F.cross_entropy(logits.float().flatten(0, 1), levels.flatten())

    curve, weights = train(
        model,
        loss_of,
        steps=args.steps,
        rate=RATE,
        checkpoint=args.output / "checkpoint.pt",
        every=25,
        average=0.99,
    )
    model.load_state_dict(weights)
    model.half().float().cpu().eval()  # judged as it is stored
    save(model, args.output / "prompts-wavenet")
    bits = model_bits(model, held_out)
    adaptive = adaptive_bits(held_out, HALF_LIFE)
    more = [other - own for own, other in zip(bits, adaptive, strict=True)]
    card = {
        "name": "prompts-wavenet",
        "parameters": parameters(model),
        "stored_bytes": packed_size(args.output / "prompts-wavenet.tar.xz"),
        "steps": args.steps,
        "batch": [BATCH, CROP],
        "bits_per_sample": per_sample(bits),
        "adaptive_linear_bits": per_sample(adaptive),
        "adaptive_linear_bits_more": per_sample(more),
        "linear_bits": per_sample(linear_bits(learnt, held_out)),
        "histogram_bits": per_sample(histogram_bits(learnt, held_out)),
        "files": [len(learnt), len(held_out)],
        "minutes": [round(sum(map(len, x)) / RATE_HZ / 60, 2) for x in (learnt, held_out)],
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
