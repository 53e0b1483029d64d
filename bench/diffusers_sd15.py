"""Stable Diffusion 1.5's shape with random weights: export, int8, int4, and a step beside torch.

    python bench/diffusers_sd15.py FOLDER make          all of it, into FOLDER/results.jsonl
    python bench/diffusers_sd15.py FOLDER save          a pipeline whose UNet is SD 1.5's (860M)
    python bench/diffusers_sd15.py FOLDER export        to a bundle, fp32
    python bench/diffusers_sd15.py FOLDER int8|int4     quantize it
    python bench/diffusers_sd15.py FOLDER run SCHEME    denoise in one step per sample
    python bench/diffusers_sd15.py FOLDER torch fp32|bf16

One part a process, so that its peak memory is its own; each prints a JSON line. `make` leaves out
what has a result already. The text encoder
and the autoencoder are small: the figures are the UNet's. Latents are 4 x 64 x 64, the batch is
1 (no guidance). A step's time is the median of `--repeats` after one that is not counted. Joules
are of the meter that leangen finds, torch's on the same one; without a counter they are estimates
from CPU time.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

UNET = {
    "sample_size": 64,
    "in_channels": 4,
    "out_channels": 4,
    "block_out_channels": (320, 640, 1280, 1280),
    "layers_per_block": 2,
    "cross_attention_dim": 768,
    "attention_head_dim": 8,
}
PROMPT = "a photograph of an astronaut riding a horse"


def save(folder: Path) -> dict[str, Any]:
    """Save the pipeline; the UNet's weights in half precision, as they are published."""
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    vocab = {chr(97 + i) + end: i + 26 * bool(end) for end in ("", "</w>") for i in range(26)}
    vocab |= {"<|startoftext|>": 52, "<|endoftext|>": 53}
    text = transformers.CLIPTextConfig(
        vocab_size=54, hidden_size=768, intermediate_size=768, num_hidden_layers=1,
        num_attention_heads=12, bos_token_id=52, eos_token_id=53, pad_token_id=53,
    )  # fmt: skip
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8, 8, 8, 8), norm_num_groups=4,
        down_block_types=("DownEncoderBlock2D",) * 4, up_block_types=("UpDecoderBlock2D",) * 4,
        sample_size=512,
    )  # fmt: skip
    pipeline = diffusers.StableDiffusionPipeline(
        vae=vae, text_encoder=transformers.CLIPTextModel(text),
        tokenizer=transformers.CLIPTokenizer(vocab=vocab, merges=[], model_max_length=77),
        unet=diffusers.UNet2DConditionModel(**UNET).half(),
        scheduler=diffusers.DDIMScheduler(
            beta_schedule="scaled_linear", beta_start=0.00085, beta_end=0.012, clip_sample=False
        ),
        safety_checker=None, feature_extractor=None, requires_safety_checker=False,
    )  # fmt: skip
    pipeline.save_pretrained(folder / "saved")
    return {"parameters": sum(each.numel() for each in pipeline.unet.parameters())}


def export(folder: Path) -> dict[str, Any]:
    """Write the fp32 bundle."""
    from leangen import exporters

    bundle = exporters.export(folder / "saved", folder / "fp32", replace=True)
    return {"size_bytes": bundle.size_bytes}


def quantized(folder: Path, scheme: str) -> dict[str, Any]:
    """Write the bundle in a scheme."""
    from leangen.bundle import open_bundle
    from leangen.quantize import quantize

    bundle = quantize(open_bundle(folder / "fp32"), scheme, folder / scheme, replace=True)
    said = bundle.quantization
    return {"size_bytes": bundle.size_bytes, "bits_per_weight": said["bits_per_weight"]}


def run(folder: Path, scheme: str, repeats: int, threads: int) -> dict[str, Any]:
    """One step a sample."""
    from leangen.bundle import open_bundle
    from leangen.engine import Engine
    from leangen.session import Session

    engine = Engine(Session(open_bundle(folder / scheme), threads=threads), baseline_s=0)
    steps, joules = [], []
    for index in range(repeats + 1):
        receipt = engine.generate(PROMPT, steps=1, guidance=1.0, seed=index).receipt
        if index:
            kinds = {step.kind: step for step in receipt.energy.steps}
            joules.append(kinds["denoise"].energy_uj / 1e6)
            share = kinds["denoise"].energy_uj / sum(step.energy_uj for step in kinds.values())
            steps.append(receipt.duration_ns / 1e9 * share)
    return {
        "step_s": statistics.median(steps),
        "step_j": statistics.median(joules),
        "source": receipt.energy.source,
        "kernels": receipt.runtime.reasons["kernels"],
    }


def in_torch(folder: Path, kind: str, repeats: int, threads: int) -> dict[str, Any]:
    """The same step of the UNet by torch."""
    import diffusers
    import torch

    from leangen import meters

    torch.set_num_threads(threads)
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[kind]
    unet = diffusers.UNet2DConditionModel.from_pretrained(
        folder / "saved" / "unet", torch_dtype=dtype
    ).eval()
    given = torch.randn(1, 4, 64, 64, dtype=dtype), torch.tensor(999)
    text = torch.randn(1, 77, 768, dtype=dtype)
    selection = meters.select()
    steps, joules = [], []
    for index in range(repeats + 1):
        window = meters.begin(selection)
        start = time.monotonic()
        with torch.no_grad():
            unet(*given, encoder_hidden_states=text)
        if index:
            steps.append(time.monotonic() - start)
            windows = meters.end(window)
            joules.append(sum(each.energy_uj or 0 for each in windows) / 1e6)
    return {
        "step_s": statistics.median(steps),
        "step_j": statistics.median(joules),
        "source": selection.source,
    }


PARTS = (
    *("save", "export", "int8", "run int8", "int4", "run int4", "run fp32"),
    *("torch fp32", "torch bf16"),
)


def make(folder: Path, options: list[str]) -> None:
    """Carry out what has no result yet, each part in a process of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.jsonl"
    lines = results.read_text().splitlines() if results.exists() else []
    done = {json.loads(line)["part"] for line in lines}
    for part in PARTS:
        if part in done:
            continue
        command = [sys.executable, __file__, str(folder), *part.split(), *options]
        line = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        with results.open("a") as file:
            file.write(line.splitlines()[-1] + "\n")
        print(line.splitlines()[-1], flush=True)


def main() -> None:
    """Carry out one part, or all."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("folder", type=Path)
    parser.add_argument("part", choices=("make", "save", "export", "int8", "int4", "run", "torch"))
    parser.add_argument("what", nargs="?", default="fp32")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    if args.part == "make":
        make(args.folder, ["--repeats", str(args.repeats), "--threads", str(args.threads)])
        return
    begun = time.monotonic()
    if args.part == "save":
        found = save(args.folder)
    elif args.part == "export":
        found = export(args.folder)
    elif args.part == "run":
        found = run(args.folder, args.what, args.repeats, args.threads)
    elif args.part == "torch":
        found = in_torch(args.folder, args.what, args.repeats, args.threads)
    else:
        found = quantized(args.folder, args.part)
    found |= {
        "part": f"{args.part} {args.what}" if args.part in ("run", "torch") else args.part,
        "seconds": time.monotonic() - begun,
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
    }
    print(json.dumps(found))


if __name__ == "__main__":
    main()
