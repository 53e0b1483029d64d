"""Train the catalog's fashion-gpt: `python bench/train/fashion_gpt.py -o DIR`

An ImageGPT (Chen et al. 2020) that draws Fashion-MNIST pixel by pixel at 14 x 14 in 16 greys; the
token before the first pixel is the label. Written as transformers saves one, in a .tar.xz.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pixels import bits_a_pixel, histogram_bits
from safetensors.torch import save_file
from shared import DEVICE, fashion, pack, packed_size, parameters, train, write_card
from torch import Tensor, nn
from torch.nn import functional as F

from leangen.catalog.clothes import CLOTHES

SIDE, LEVELS, BATCH, RATE = 14, 16, 32, 2e-3
PIXELS = SIDE**2
CONFIG: dict[str, Any] = {
    "model_type": "imagegpt",
    "vocab_size": LEVELS + len(CLOTHES),
    "labels": list(CLOTHES),
    "n_positions": PIXELS,
    "n_embd": 128,
    "n_layer": 4,
    "n_head": 2,
    "layer_norm_epsilon": 1e-5,
    "activation_function": "quick_gelu",
}


class Norm(nn.Module):
    """Without a mean, as ImageGPT has it."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(CONFIG["n_embd"]))

    def forward(self, x: Tensor) -> Tensor:
        size = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32)
        scale = torch.rsqrt(size.square() / x.shape[-1] + CONFIG["layer_norm_epsilon"])
        return x * scale.to(x.dtype) * self.weight.to(x.dtype)


class Layer(nn.Module):
    """Attention over the pixels before, then two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["n_embd"]
        self.ln_1, self.ln_2 = Norm(), Norm()
        self.c_attn, self.c_proj = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.c_fc, self.c_out = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, width = x.shape
        heads = (n, length, 3, CONFIG["n_head"], width // CONFIG["n_head"])
        q, k, v = self.c_attn(self.ln_1(x)).view(heads).permute(2, 0, 3, 1, 4)
        # Written out: on a CPU it takes half the time of the fused one.
        later = torch.full((length, length), -1e9, dtype=q.dtype, device=q.device).triu(1)
        scores = q @ k.transpose(-1, -2) * (width // CONFIG["n_head"]) ** -0.5 + later
        y = scores.softmax(-1).to(v.dtype) @ v
        x = x + self.c_proj(y.transpose(1, 2).reshape(n, length, width))
        y = self.c_fc(self.ln_2(x))
        return x + self.c_out(y * torch.sigmoid(1.702 * y))


class ImageGPT(nn.Module):
    """Pixels [n, 196] and labels [n] to logits [n, 196, 16], each of the pixel at that place."""

    def __init__(self) -> None:
        super().__init__()
        width = CONFIG["n_embd"]
        self.wte = nn.Embedding(CONFIG["vocab_size"], width)
        self.wpe = nn.Embedding(PIXELS, width)
        self.h = nn.ModuleList(Layer() for _ in range(CONFIG["n_layer"]))
        self.ln_f = Norm()
        self.lm_head = nn.Linear(width, LEVELS, bias=False)
        for name, weight in self.named_parameters():
            if weight.ndim == 2:
                deep = name.endswith(("c_proj.weight", "c_out.weight"))
                nn.init.normal_(weight, std=0.02 / (2 * CONFIG["n_layer"]) ** (0.5 * deep))

    def forward(self, pixels: Tensor, labels: Tensor) -> Tensor:
        tokens = torch.cat([labels[:, None] + LEVELS, pixels[:, :-1]], 1)
        x = self.wte(tokens) + self.wpe.weight
        x = x.bfloat16() if torch.is_autocast_enabled(x.device.type) else x
        for layer in self.h:
            x = layer(x)
        return self.lm_head(self.ln_f(x))


def shrunk(images: np.ndarray[Any, Any]) -> np.ndarray[Any, Any]:
    """Pictures uint8 [n, 28, 28] as levels [n, 196]: means of four pixels, in 16 steps."""
    means = images.reshape(-1, SIDE, 2, SIDE, 2).mean(axis=(2, 4))
    return (means * LEVELS / 256).astype(np.int64).reshape(-1, PIXELS)


def save(model: ImageGPT, folder: Path) -> None:
    """The folder that transformers would save, in fp16, and a .tar.xz of it."""
    folder.mkdir(exist_ok=True)
    weights = {}
    for name, value in model.state_dict().items():
        if name != "lm_head.weight":
            name = "transformer." + name.replace("c_attn", "attn.c_attn")
            name = name.replace("c_proj", "attn.c_proj").replace("c_fc", "mlp.c_fc")
            name = name.replace("c_out", "mlp.c_proj")
        if ".c_" in name and name.endswith("weight"):
            value = value.T  # transformers' Conv1D is [in, out]
        weights[name] = value.half().contiguous().cpu()
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    greys = [[round(2 * level / (LEVELS - 1) - 1, 6)] for level in range(LEVELS)]
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=1), encoding="utf-8")
    said = json.dumps({"clusters": greys})
    (folder / "preprocessor_config.json").write_text(said, encoding="utf-8")
    pack(folder)


def main() -> None:
    """Train, write, judge."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    parser.add_argument("--data", type=Path, metavar="DIR", help="Fashion-MNIST's four files")
    parser.add_argument("--steps", type=int, default=800)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    images, labels = fashion("train", args.data)
    pixels, labels = shrunk(images), torch.from_numpy(labels)
    torch.manual_seed(0)
    model = ImageGPT().to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = rng.integers(0, len(pixels), BATCH)
        x = torch.from_numpy(pixels[rows]).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16):
            logits = model(x, labels[rows].to(DEVICE))
        return F.cross_entropy(logits.float().flatten(0, 1), x.flatten())

    checkpoint = args.output / "checkpoint.pt"
    curve, weights = train(
        model, loss_of, steps=args.steps, rate=RATE, checkpoint=checkpoint, average=0.99
    )
    model.load_state_dict(weights)
    model.half().float().cpu().eval()  # judged as it is stored
    save(model, args.output / "fashion-gpt")
    test, said = fashion("t10k", args.data)
    bits = bits_a_pixel(lambda x, label: model(x, label), shrunk(test), said, LEVELS)
    card = {
        "name": "fashion-gpt",
        "parameters": parameters(model),
        "stored_bytes": packed_size(args.output / "fashion-gpt.tar.xz"),
        "steps": args.steps,
        "batch": BATCH,
        "bits_per_dimension": bits,
        "histogram_bits_per_dimension": histogram_bits(pixels, shrunk(test), LEVELS),
        "loss_curve": curve,
    }
    write_card(args.output / "card.json", card)


if __name__ == "__main__":
    main()
