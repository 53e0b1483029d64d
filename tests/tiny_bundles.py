"""A tiny bundle of every family, exported the way a user's model would be."""

from __future__ import annotations

import pickle
from pathlib import Path

import autoregressive_fixtures
import numpy as np
import onnx
import seq2seq_fixtures
from flow_models import coupling_info, flow_state, write_voice
from gguf_fixtures import Tiny, write
from tokenizers import Tokenizer, models, pre_tokenizers

from leangen.bundle import Bundle
from leangen.exporters import ctranslate2, gguf, onnx_file, piper, pzflow
from leangen.exporters import embedding as embedding_folder


def language(folder: Path) -> Bundle:
    """Two layers of a llama with random weights."""
    return gguf.export(write(folder / "tiny.gguf", Tiny(tied=False)), folder / "bundle")


def speech(folder: Path) -> Bundle:
    """A VITS of a few hundred weights."""
    return piper.export(write_voice(folder), folder / "bundle")


def density(folder: Path) -> Bundle:
    """Three spline couplings over three columns."""
    folder.mkdir(parents=True, exist_ok=True)
    bounds = (np.float32([0, 0, 0]), np.float32([1, 2, 3]), 4)
    parts = [("ShiftBounds", bounds), *[coupling_info(), ("Roll", (1,))] * 3]
    path = folder / "tiny.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state(parts, 3)))
    return pzflow.export(path, folder / "bundle")


def _graph(text: str, path: Path, **weights: tuple[int, ...]) -> Path:
    """An ONNX file of a graph in ONNX's text form, with random weights of the given shapes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    model = onnx.parser.parse_model(f'<ir_version: 10, opset_import: ["": 21]>\n{text}')
    rng = np.random.default_rng(0)
    for name, shape in weights.items():
        scale = np.float32(1 / np.sqrt(np.prod(shape[1:])))
        values = rng.standard_normal(shape, np.float32) * scale
        model.graph.initializer.append(onnx.numpy_helper.from_array(values, name))
    onnx.save(model, path)
    return path


def diffusion(folder: Path) -> Bundle:
    """A denoiser of two convolutions, 8 x 8 pixels, with one condition."""
    text = """
    denoiser (float[b, 1, 8, 8] noisy, float[b] sigma, float[b] wetness) => (float[b, 1, 8, 8] y) {
        axes = Constant <value = int64[3] {1, 2, 3}> ()
        s = Unsqueeze (sigma, axes)
        c = Unsqueeze (wetness, axes)
        one = Constant <value = float {1.0}> ()
        t = Add (s, one)
        x = Div (noisy, t)
        h = Conv <pads = [1, 1, 1, 1]> (x, w0)
        a = Sigmoid (h)
        b0 = Add (a, c)
        y = Conv <pads = [1, 1, 1, 1]> (b0, w1)
    }"""
    path = _graph(text, folder / "tiny.onnx", w0=(32, 1, 3, 3), w1=(1, 32, 3, 3))
    return onnx_file.export(path, folder / "bundle", conditions={"wetness": {"default": 0.5}})


def oneshot(folder: Path) -> Bundle:
    """A generator: a dense layer, then a convolution, 8 x 8 pixels."""
    text = """
    generator (float[b, 16] z) => (float[b, 1, 8, 8] y) {
        m = MatMul (z, w0)
        shape = Constant <value = int64[4] {-1, 16, 8, 8}> ()
        h = Reshape (m, shape)
        y = Conv <pads = [1, 1, 1, 1]> (h, w1)
    }"""
    path = _graph(text, folder / "tiny.onnx", w0=(16, 1024), w1=(1, 16, 3, 3))
    return onnx_file.export(path, folder / "bundle", family="oneshot")


def pixel_rows(folder: Path) -> Bundle:
    """A PixelCNN of one layer: 5 x 6 pixels of 8 levels, in three kinds of picture."""
    text = """
    rows_of_pixels (int64[n, r, 6] rows, int64[n] label, float[n, 1, 1, 6] state_0)
        => (float[n, r, 6, 8] logits, float[n, 1, 1, 6] next_state_0) {
        levels = Cast <to = 1> (rows)
        channel = Constant <value = int64[1] {1}> ()
        x = Unsqueeze (levels, channel)
        seen = Concat <axis = 2> (state_0, x)
        first = Constant <value = int64[1] {0}> ()
        last = Constant <value = int64[1] {-1}> ()
        end = Constant <value = int64[1] {99}> ()
        down = Constant <value = int64[1] {2}> ()
        right = Constant <value = int64[1] {3}> ()
        next_state_0 = Slice (seen, last, end, down)
        over = Slice (seen, first, last, down)
        above = Conv <pads = [0, 1, 0, 1]> (over, w0)
        known = Slice (x, first, last, right)
        left = Conv <pads = [0, 2, 0, 0]> (known, w1)
        told = Gather (w2, label)
        places = Constant <value = int64[2] {2, 3}> ()
        shift = Unsqueeze (told, places)
        sum = Add (above, left)
        all = Add (sum, shift)
        h = Tanh (all)
        y = Conv (h, w3)
        logits = Transpose <perm = [0, 2, 3, 1]> (y)
    }"""
    shapes = {"w0": (192, 1, 1, 3), "w1": (192, 1, 1, 2), "w2": (3, 192)}
    shapes["w3"] = (8, 192, 1, 1)
    path = _graph(text, folder / "tiny.onnx", **shapes)
    label = {"min": 0, "max": 2, "names": {"sock": 1}}
    return onnx_file.export(
        path, folder / "bundle", conditions={"label": label}, height=5, levels=8
    )


def embedding(folder: Path) -> Bundle:
    """An encoder of two dense layers over a vocabulary of 32 words, as an ONNX file."""
    text = """
    encoder (int64[n, t] input_ids, int64[n, t] attention_mask)
        => (float[n, t, 64] token_embeddings) {
        x = Gather (w0, input_ids)
        h = MatMul (x, w1)
        a = Tanh (h)
        y = MatMul (a, w2)
        token_embeddings = Add (y, x)
    }"""
    _graph(text, folder / "model.onnx", w0=(32, 64), w1=(64, 64), w2=(64, 64))
    words = {f"w{index}": index for index in range(31)} | {"?": 31}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="?"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.enable_padding(length=8)  # which an export is to take off
    tokenizer.save(str(folder / "tokenizer.json"))
    return embedding_folder.export(folder, folder / "bundle", context=48)


def transcription(folder: Path) -> Bundle:
    """A Whisper that hears 1.2 seconds at once."""
    return ctranslate2.export(seq2seq_fixtures.ctranslate2(folder / "saved"), folder / "bundle")


BUILDERS = {
    "language": language,
    "seq2seq/text": seq2seq_fixtures.text_to_text,
    "seq2seq/transcription": transcription,
    "embedding": embedding,
    "autoregressive/image": autoregressive_fixtures.image,
    "autoregressive/rows": pixel_rows,
    "autoregressive/audio": autoregressive_fixtures.sound,
    "flow/speech": speech,
    "flow/density": density,
    "diffusion": diffusion,
    "oneshot": oneshot,
}
OPTIONS = {
    "language": {"tokens": [3, 4, 5], "max_new_tokens": 6, "ignore_eos": True},
    "embedding": {"prompt": ["w1 w2 w3", "w4", "w5 w6"]},
    "seq2seq/text": {"tokens": [3, 4, 5, 2], "max_new_tokens": 6, "ignore_eos": True},
    "seq2seq/transcription": {"audio": [0.1, -0.1] * 12_000, "max_new_tokens": 6},
    "autoregressive/image": {"count": 2},
    "autoregressive/rows": {"count": 2, "conditions": {"label": "sock"}},
    "autoregressive/audio": {"seconds": 0.5},
    "flow/speech": {"phonemes": "abc ab."},
    "flow/density": {"count": 20},
    "diffusion": {"steps": 3, "conditions": {"wetness": 0.2}},
    "oneshot": {"count": 2},
}
"""A request per family that its tiny bundle can carry out."""
