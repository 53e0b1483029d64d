"""Train the zoo's fashion-vae and fashion-latent: `python bench/train/fashion_latent.py -o DIR`

Latent diffusion (Rombach et al. 2022): an autoencoder with a slight Kullback-Leibler penalty turns
28 x 28 pixels into 4 x 7 x 7 numbers of unit variance; a denoiser of those predicts v on the cosine
schedule, told by the catalog's minilm-l6 what a caption says. A tenth of the captions are dropped,
for guidance.
"""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import torch
from fashion_captions import training
from fashion_diffusion import (
    EMBEDDING,
    Attention,
    Block,
    Clock,
    Pictures,
    arguments,
    dropped,
    finish,
    loss,
    normal,
    v_noised,
)
from shared import DEVICE, batches, fashion, train
from torch import Tensor, nn
from torch.nn import functional as F

import leangen as lg
from leangen.families import embedding

BATCH, RATE = 64, 1e-3
CHANNELS, WIDE, DEEP = 4, 32, 64
"""Of the latents, and of the autoencoder at 14 x 14 and at 7 x 7."""
PENALTY = 1e-3
"""Weight of the divergence of a latent from a normal one, beside squared errors of pixels."""
WIDTH, READ = 80, 384
"""Channels of the denoiser, and numbers that a caption becomes."""
BLUR = 0.01
"""Deviation of noise on the numbers of a caption: another wording of it lies nearby."""


class Encoder(nn.Module):
    """Pictures [b, 1, 28, 28] to means and logarithms of variances [b, 8, 7, 7]."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(
            nn.PixelUnshuffle(2),
            nn.Conv2d(4, WIDE, 3, padding=1),
            Block(WIDE, WIDE, 0),
            nn.Conv2d(WIDE, DEEP, 3, stride=2, padding=1),
            Block(DEEP, DEEP, 0),
            nn.GroupNorm(8, DEEP),
            nn.SiLU(),
            nn.Conv2d(DEEP, 2 * CHANNELS, 3, padding=1),
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x)


class Decoder(nn.Module):
    """Latents [b, 4, 7, 7] of unit variance to pictures [b, 1, 28, 28] in -1..1."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.ones(1, CHANNELS, 1, 1))
        self.register_buffer("shift", torch.zeros(1, CHANNELS, 1, 1))
        self.body = nn.Sequential(
            nn.Conv2d(CHANNELS, DEEP, 3, padding=1),
            Block(DEEP, DEEP, 0),
            Block(DEEP, DEEP, 0),
            nn.Upsample(scale_factor=2.0, mode="nearest"),
            nn.Conv2d(DEEP, WIDE, 3, padding=1),
            Block(WIDE, WIDE, 0),
            nn.GroupNorm(8, WIDE),
            nn.SiLU(),
            nn.Conv2d(WIDE, 4, 3, padding=1),
            nn.PixelShuffle(2),
            nn.Tanh(),
        )

    def forward(self, latent: Tensor) -> Tensor:
        return self.body(latent * self.scale + self.shift)


class Denoiser(nn.Module):
    """Latents [b, 4, 7, 7], timesteps [b] and captions [b, 384] to v, at one size throughout."""

    def __init__(self) -> None:
        super().__init__()
        self.time = Clock()
        self.read = nn.Sequential(
            nn.Linear(READ, EMBEDDING), nn.SiLU(), nn.Linear(EMBEDDING, EMBEDDING)
        )
        self.stem = nn.Conv2d(CHANNELS, WIDTH, 3, padding=1)
        self.before = nn.ModuleList([Block(WIDTH, WIDTH), Block(WIDTH, WIDTH)])
        self.attention = Attention(WIDTH)
        self.after = nn.ModuleList([Block(WIDTH, WIDTH), Block(WIDTH, WIDTH)])
        self.norm = nn.GroupNorm(8, WIDTH)
        self.head = nn.Conv2d(WIDTH, CHANNELS, 3, padding=1)

    def forward(self, sample: Tensor, timestep: Tensor, text: Tensor) -> Tensor:
        # The numbers of a caption are a unit vector's: of unit variance they are learnt faster.
        embedding = F.silu(self.time(timestep) + self.read(text * math.sqrt(READ)))
        h = self.stem(sample)
        for block in self.before:
            h = block(h, embedding)
        h = self.attention(h)
        for block in self.after:
            h = block(h, embedding)
        return self.head(F.silu(self.norm(h)))


@torch.no_grad()
def latents_of(encoder: Encoder, pixels: Tensor) -> Tensor:
    """Means and logarithms of variances of all pictures, and of their mirror images."""
    found = [encoder(pixels[part].to(DEVICE)).cpu() for part in batches(len(pixels), 500)]
    found += [encoder(pixels[part].flip(-1).to(DEVICE)).cpu() for part in batches(len(pixels), 500)]
    return torch.cat(found)


@torch.no_grad()
def restored_db(encoder: Encoder, decoder: Decoder, folder: Path | None) -> float:
    """Peak signal-to-noise ratio of the test set's first 1,000 pictures, coded and decoded."""
    x = torch.from_numpy(fashion("t10k", folder)[0][:1000].astype(np.float32) / 127.5 - 1)[:, None]
    mean = encoder(x.to(DEVICE))[:, :CHANNELS]
    error = F.mse_loss(decoder((mean - decoder.shift) / decoder.scale).cpu(), x)
    return round(10 * math.log10(4 / float(error)), 2)


def read() -> Tensor:
    """What the captions of each label become, [label, caption, number]."""
    session = lg.load("minilm-l6", ledger=False, baseline_s=0).session
    vectors = [torch.from_numpy(embedding.embed(session, texts)) for texts in training()]
    return torch.stack(vectors).to(DEVICE)


def main() -> None:
    """Train both, export the decoder and the denoiser."""
    args = arguments(__doc__, vae_steps=1200, denoiser_steps=2000)
    pictures = Pictures(args.data)
    coder = nn.ModuleDict({"encoder": Encoder(), "decoder": Decoder()}).to(DEVICE)
    encoder, decoder = coder["encoder"], coder["decoder"]

    def coder_loss(rng: np.random.Generator) -> Tensor:
        x, _ = pictures.batch(rng, BATCH)
        with torch.autocast(DEVICE, torch.bfloat16):
            mean, spread = encoder(x).float().chunk(2, 1)
            answer = decoder(mean + (spread / 2).exp() * normal(rng, mean))
        divergence = (mean**2 + spread.exp() - 1 - spread).mean() / 2
        return F.mse_loss(answer.float(), x) + PENALTY * divergence

    curve, weights = train(
        coder, coder_loss, steps=args.vae_steps, rate=RATE, checkpoint=args.output / "vae.pt"
    )
    coder.load_state_dict(weights)
    coder.eval()
    known = latents_of(encoder, pictures.pixels)
    shift = known[:, :CHANNELS].mean((0, 2, 3), keepdim=True)
    scale = (
        known[:, :CHANNELS].var((0, 2, 3), keepdim=True)
        + known[:, CHANNELS:].exp().mean((0, 2, 3), keepdim=True)
    ).sqrt()
    decoder.shift.copy_(shift)
    decoder.scale.copy_(scale)
    inputs = {"latent": torch.zeros(2, CHANNELS, 7, 7)}
    path = args.output / "fashion-vae.onnx"
    told = {"restored_psnr_db": restored_db(encoder, decoder, args.data), "steps": args.vae_steps}
    finish(decoder, inputs, "image", path, batch=BATCH, **told, loss_curve=curve)
    decoder.to(DEVICE)

    model = Denoiser().to(DEVICE)
    captions, labels = read(), torch.cat([pictures.labels, pictures.labels])
    scale, shift = scale.to(DEVICE), shift.to(DEVICE)

    def loss_of(rng: np.random.Generator) -> Tensor:
        rows = torch.from_numpy(rng.integers(0, len(known), BATCH))
        mean, spread = known[rows].to(DEVICE).chunk(2, 1)
        latent = (mean + (spread / 2).exp() * normal(rng, mean) - shift) / scale
        chosen = torch.from_numpy(rng.integers(0, captions.shape[1], BATCH)).to(DEVICE)
        text = captions[labels[rows].to(DEVICE), chosen]
        text = dropped(text + BLUR * normal(rng, text), 0.0, rng)
        noisy, timestep, v = v_noised(latent, rng)
        return loss(model, (noisy, timestep, text), v)

    curve, weights = train(
        model,
        loss_of,
        steps=args.denoiser_steps,
        rate=RATE,
        checkpoint=args.output / "denoiser.pt",
    )
    model.load_state_dict(weights)
    inputs = {
        "sample": torch.zeros(2, CHANNELS, 7, 7),
        "timestep": torch.zeros(2, dtype=torch.int64),
        "text": torch.zeros(2, READ),
    }
    path = args.output / "fashion-latent.onnx"
    finish(model, inputs, "v", path, steps=args.denoiser_steps, batch=BATCH, loss_curve=curve)


if __name__ == "__main__":
    main()
