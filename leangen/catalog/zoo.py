"""Models that bench/train made, in leangen's own package or in the distribution leangen-zoo."""

from __future__ import annotations

from leangen.catalog.clothes import LABEL, PIXELS
from leangen.catalog.sources import Entry, Packaged, gguf_forms

ENTRIES = (
    Entry(
        name="smiles-lm",
        family="language",
        summary="molecules as SMILES, 5.6M parameters, trained by bench/train/smiles_lm.py",
        source=Packaged(
            filename="smiles-lm.gguf.xz",
            sha256="84d0d3701291e2274909cda6a097016b9bfd4b52ed405fd5aae532779bbdc8db",
            size_bytes=10_158_704,
            licence="MIT (weights; data MOSES, MIT)",
        ),
        exporter="gguf",
        text="smiles.txt",
        **gguf_forms("F16"),
    ),
    Entry(
        name="smiles-joint",
        family="language",
        summary="smiles-lm that also says a molecule's logP and QED; bench/train/smiles_joint.py",
        source=Packaged(
            filename="smiles-joint.gguf.xz",
            sha256="940188f9d4118d8fbaf63c93fd8ade85c0d20d241c32dfda0049ba2402225e26",
            size_bytes=10_161_784,
            licence="MIT (weights; data MOSES, MIT)",
            distribution="leangen-zoo",
        ),
        exporter="gguf",
        text="smiles.txt",
        **gguf_forms("F16"),
    ),
    Entry(
        name="fashion-gpt",
        family="autoregressive",
        summary="ImageGPT of 0.8M parameters, 14 x 14 clothes by label; bench/train/fashion_gpt.py",
        source=Packaged(
            filename="fashion-gpt.tar.xz",
            sha256="6839ac8f7f4b86f3c89e48b1f8e50a70b0da64657acd4ad4beef228c58ecd19f",
            size_bytes=1_493_264,
            licence="MIT (weights; data Fashion-MNIST, MIT)",
            distribution="leangen-zoo",
        ),
        exporter="imagegpt",
        forms={"fp32": {}},
    ),
    Entry(
        name="fashion-pixelcnn",
        family="autoregressive",
        summary="gated PixelCNN, 28 x 28 clothes in 256 greys; bench/train/fashion_pixelcnn.py",
        source=Packaged(
            filename="fashion-pixelcnn.onnx.xz",
            sha256="27a17e75a01964db9b905d4b4638836b83d5d191724d47d9933a407a65b24ecc",
            size_bytes=249_260,
            licence="MIT (weights; data Fashion-MNIST, MIT)",
            distribution="leangen-zoo",
        ),
        exporter="onnx",
        forms={
            "fp32": {"family": "autoregressive", "conditions": {"label": LABEL}, "range": PIXELS}
        },
    ),
    Entry(
        name="prompts-wavenet",
        family="autoregressive",
        summary="WaveNet, babble in one voice at 8 kHz, no text; bench/train/prompts_wavenet.py",
        source=Packaged(
            filename="prompts-wavenet.tar.xz",
            sha256="5888afa71a57f6fd7b3c8ea641470d40fc5312f6265a9b113259cd69571a2038",
            size_bytes=924_888,
            licence="CC BY-SA 3.0 (weights; data Asterisk's prompts, spoken by Allison Smith)",
            distribution="leangen-zoo",
        ),
        exporter="wavenet",
        forms={"fp32": {}},
    ),
)
