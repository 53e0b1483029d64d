"""What the training scripts share: data, a moving average of weights, checkpoints, ONNX, cards."""

from __future__ import annotations

import gzip
import hashlib
import json
import lzma
import shutil
import subprocess
import tarfile
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from leangen.console import progress_bar, say

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
FASHION = {
    "train-images-idx3-ubyte": "c59f468a2f672dc815687fe0f83887768d799fd8a3f3276145d20f83aa44d888",
    "train-labels-idx1-ubyte": "bad3541b69d912435c50bb6ba87bec294ff4f6a2e1246121d8633921760443d9",
    "t10k-images-idx3-ubyte": "5b4141f0afbad91edebe8549f8fcffe087ea10ca49f1dbef5c9a5cd8815ce37b",
    "t10k-labels-idx1-ubyte": "0402a96d92fd2663957122ceb108a494c5af83dab82d92729df917d7dec38c34",
}
"""Fashion-MNIST (Xiao et al. 2017, MIT): its files, unpacked, and their sha256."""


def fashion(part: str, folder: Path | None = None) -> tuple[np.ndarray[Any, Any], Any]:
    """Images uint8 [n, 28, 28] and labels [n] of `train` (60,000) or `t10k` (10,000).

    They are read from `folder`, or from Debian's package dataset-fashion-mnist.
    """
    if folder is None:
        folder = _debian("dataset-fashion-mnist") / "usr/share/datasets/fashion-mnist"
    arrays = []
    for kind, header in (("images-idx3", 16), ("labels-idx1", 8)):
        name = f"{part}-{kind}-ubyte"
        content = gzip.decompress((folder / f"{name}.gz").read_bytes())
        if hashlib.sha256(content).hexdigest() != FASHION[name]:
            raise SystemExit(f"{folder / name}.gz is not the published file: its sha256 differs")
        arrays.append(np.frombuffer(content, np.uint8, offset=header))
    images, labels = arrays
    return images.reshape(-1, 28, 28), labels.astype(np.int64)


def _debian(package: str) -> Path:
    """The unpacked files of a Debian package, downloaded once beside leangen's store."""
    from leangen.store import Store

    target = Store().home / "data" / package
    if not target.is_dir():
        if shutil.which("apt-get") is None:
            raise SystemExit(f"without apt-get there is no {package}: give its files with --data")
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent) as scratch:
            say(f"downloading Debian's {package}")
            subprocess.run(["apt-get", "download", package], cwd=scratch, check=True)
            (archive,) = Path(scratch).glob("*.deb")
            unpacked = Path(scratch) / "unpacked"
            subprocess.run(["dpkg-deb", "-x", archive, unpacked], check=True)
            unpacked.rename(target)
    return target


class Average:
    """Exponential moving average of a model's weights, warmed up (Karras et al. 2022)."""

    def __init__(self, model: nn.Module, decay: float = 0.999) -> None:
        self.decay, self.steps = decay, 0
        self.weights = {name: value.detach().clone() for name, value in model.state_dict().items()}

    @torch.no_grad()
    def update(self, model: nn.Module) -> None:
        """Take in the weights of one more step."""
        self.steps += 1
        decay = min(self.decay, self.steps / (self.steps + 10))
        for name, value in model.state_dict().items():
            if value.is_floating_point():  # else a mask or an order: it is as it was
                self.weights[name].lerp_(value, 1 - decay)


def train(
    model: nn.Module,
    loss_of: Callable[[np.random.Generator], Tensor],
    *,
    steps: int,
    rate: float,
    checkpoint: Path,
    every: int = 100,
    average: float = 0.999,
    betas: tuple[float, float] = (0.9, 0.99),
) -> tuple[list[tuple[int, float]], dict[str, Tensor]]:
    """AdamW with a warm-up and then a constant rate; the loss curve and the averaged weights.

    `loss_of` gets a generator of its step, so that the steps do not depend on interruptions. The
    rate is constant and the weights are averaged, so that a run of fewer steps is the beginning of
    a longer one. It may be interrupted: the next run goes on from the checkpoint.
    """
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, betas=betas)
    ema, done, curve = Average(model, average), 0, []
    if checkpoint.exists():
        state = torch.load(checkpoint, weights_only=True, map_location=DEVICE)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        ema.weights, ema.steps = state["average"], state["step"]
        done, curve = state["step"], state["curve"]
        say(f"going on from step {done}")
    total = 0.0
    with progress_bar() as progress:
        for step in range(done, steps):
            for group in optimizer.param_groups:
                group["lr"] = rate * min(1.0, (step + 1) / 200)
            torch.manual_seed(step)
            loss = loss_of(np.random.default_rng(step))
            optimizer.zero_grad(set_to_none=True)
            loss.backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            ema.update(model)
            total += float(loss.detach())
            if (step + 1) % every == 0 or step + 1 == steps:
                curve.append((step + 1, round(total / (step % every + 1), 5)))
                total = 0.0
                state = {"model": model.state_dict(), "optimizer": optimizer.state_dict()}
                state |= {"average": ema.weights, "step": step + 1, "curve": curve}
                torch.save(state, checkpoint.with_suffix(".new"))
                checkpoint.with_suffix(".new").replace(checkpoint)
            progress(step + 1, steps, f"loss {float(loss.detach()):.4f}")
    return curve, ema.weights


def export_onnx(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    outputs: Sequence[str],
    path: Path,
    *,
    also_open: Mapping[str, str] | None = None,
) -> None:
    """An ONNX file of a model, `path`, and `path`.xz, as which a package keeps it.

    Weights are rounded to fp16 and stored as fp32, so that what is judged is what is kept: the
    compressed file is hardly larger than fp16. The first size of inputs and outputs is left open,
    and the second of those that `also_open` names, under that name.
    """
    sizes = {name: {0: "n"} for name in (*inputs, *outputs)}
    for name, size in (also_open or {}).items():
        sizes[name][1] = size
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.half())
    with warnings.catch_warnings():
        # The tracing exporter is enough for these models, and writes no copy of each shape.
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model.eval(),
            tuple(inputs.values()),
            str(path),
            input_names=list(inputs),
            output_names=list(outputs),
            dynamic_axes=sizes,
            opset_version=18,
            dynamo=False,
        )
    packed = lzma.compress(path.read_bytes(), preset=9 | lzma.PRESET_EXTREME)
    stored = path.with_name(path.name + ".xz")
    stored.write_bytes(packed)
    packed_size(stored)


def pack(folder: Path) -> None:
    """A .tar.xz of a folder's files, beside it."""
    with tarfile.open(folder.with_name(f"{folder.name}.tar.xz"), "w:xz", preset=9) as packed:
        for path in sorted(folder.iterdir()):
            entry = tarfile.TarInfo(path.name)  # no dates or owners: same weights, same file
            entry.size = path.stat().st_size
            with path.open("rb") as file:
                packed.addfile(entry, file)


def packed_size(path: Path) -> int:
    """The size of a file, after saying it and its sha256, which the catalog asks for."""
    content = path.read_bytes()
    say(f"{path.name}: {len(content)} bytes, sha256 {hashlib.sha256(content).hexdigest()}")
    return len(content)


def batches(count: int, size: int) -> Iterator[slice]:
    """Slices of `size` over `count` rows."""
    return (slice(start, start + size) for start in range(0, count, size))


def parameters(model: nn.Module) -> int:
    """How many weights a model has."""
    return sum(weight.numel() for weight in model.parameters())


def write_card(path: Path, card: dict[str, Any]) -> None:
    """The card as JSON beside the model, and on standard output without its loss curve."""
    path.write_text(json.dumps(card, indent=1) + "\n", encoding="utf-8")
    print(json.dumps({key: value for key, value in card.items() if key != "loss_curve"}))
