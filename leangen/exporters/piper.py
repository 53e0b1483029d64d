"""Exports a Piper voice (VITS, Kim et al., arXiv:2106.06103) to a bundle of three graphs.

Piper ships one ONNX graph that draws its own noise. It is cut where speech changes rate, so that
each part has its own scheme and its own step, and so that noise and durations come from outside:

    encoder   phoneme_ids, noise -> prior_mean, prior_log_scale, durations    one column a phoneme
    flow      prior -> latent                                                 one column a frame
    decoder   latent -> audio                                                 samples

What lies between (scaling durations, repeating columns, adding noise) is exact in NumPy. One
utterance at a time, so the padding masks are all ones and fall away. Voices with several speakers
also take `speaker` where the graph needs it.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import onnx
from google.protobuf.message import DecodeError  # type: ignore[import-untyped]

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import SourceError, UnsupportedError
from leangen.exporters.onnx_cut import Shape, consumers, cut, producers


def accepts(path: Path) -> bool:
    """Whether `path` is an `.onnx` with the voice's `.onnx.json` beside it."""
    return path.suffix == ".onnx" and _json_path(path).is_file()


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Write the bundle of the voice `path` (`VOICE.onnx`, with `VOICE.onnx.json` beside it).

    Raises SourceError for files that are missing, damaged or not of a voice, UnsupportedError for a
    graph that is not Piper's VITS, StorageError for the disk.
    """
    config = _read_config(_json_path(path))
    model = _read_model(path)
    points = _find_points(model.graph, path)
    try:
        parts = _cut_parts(model, points)
    except ValueError as error:
        raise UnsupportedError(
            f"{path} cannot be cut into encoder, flow and decoder ({error}): "
            "only voices exported by Piper's own training are known"
        ) from error
    with create(out, replace=replace) as draft:
        for role, part in parts.items():
            onnx.save_model(
                part,
                draft.folder / f"{role}.onnx",
                save_as_external_data=True,
                location=f"{role}.onnx.data",
                size_threshold=1024,
            )
            draft.graphs[role] = f"{role}.onnx"
        draft.name = name or path.stem
        draft.family = "flow"
        draft.config = config
        draft.source = {"kind": "piper", "sha256": sha256_file(path), **(source or {})}
    return open_bundle(out)


def _json_path(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _read_config(path: Path) -> dict[str, Any]:
    """What the family needs of the voice's JSON; SourceError when it is not one."""
    try:
        voice = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise SourceError(
            f"cannot read {path}: {error.strerror}; a Piper voice is two files, VOICE.onnx and "
            "VOICE.onnx.json: put both in one folder"
        ) from error
    except ValueError as error:  # not JSON, or not UTF-8
        raise SourceError(f"{path} is not JSON ({error}): download the voice again") from error
    try:
        id_map = {str(k): [int(i) for i in ids] for k, ids in voice["phoneme_id_map"].items()}
        defaults = voice.get("inference", {})
        config = {
            "task": "speech",
            "sample_rate_hz": int(voice["audio"]["sample_rate"]),
            "phoneme_id_map": id_map,
            "symbols": max(
                int(voice.get("num_symbols", 0)), 1 + max(i for ids in id_map.values() for i in ids)
            ),
            "speakers": int(voice.get("num_speakers", 1)),
            "speaker_ids": dict(voice.get("speaker_id_map", {})),
            "voice": str(voice.get("espeak", {}).get("voice", "")),
            "noise_scale": float(defaults.get("noise_scale", 0.667)),
            "noise_w": float(defaults.get("noise_w", 0.8)),
            "length_scale": float(defaults.get("length_scale", 1.0)),
        }
        missing = [symbol for symbol in "_^$" if symbol not in id_map]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise SourceError(
            f"{path} is not the JSON of a Piper voice ({type(error).__name__}: {error}): expected "
            "`audio.sample_rate` and `phoneme_id_map`"
        ) from error
    if missing:
        raise SourceError(f"{path}: phoneme_id_map lacks {', '.join(missing)}, not a Piper voice")
    return config


def _read_model(path: Path) -> onnx.ModelProto:
    try:
        model = onnx.load(path)
    except OSError as error:
        raise SourceError(f"cannot read {path}: {error.strerror}") from error
    except DecodeError as error:
        raise SourceError(
            f"{path} is not an ONNX file, or is truncated: download it again"
        ) from error
    if not model.graph.node:
        raise SourceError(f"{path} is not an ONNX file: it has no graph; download it again")
    return model


class _Points(NamedTuple):
    """Names of the tensors at which the voice is cut."""

    duration_noise: str
    """Standard normal noise times noise_w, [1, 2, phonemes]."""
    mean: str
    log_scale: str
    """Of the prior, [1, channels, phonemes]."""
    durations: str
    """Frames per phoneme before scaling and rounding up, [1, 1, phonemes]."""
    phoneme_mask: str
    prior: str
    """Prior sample, [1, channels, frames]."""
    latent: str
    """What the decoder reads, [1, channels, frames]."""
    frame_mask: str


class _NotVits(Exception):
    """The graph lacks something that every Piper voice has; the text says what."""


def _find_points(graph: onnx.GraphProto, path: Path) -> _Points:
    """The cut points, found by the graph's structure; UnsupportedError when it is another."""
    try:
        return _Finder(graph).points()
    except _NotVits as error:
        raise UnsupportedError(
            f"{path} is not a Piper voice that leangen knows: {error}; expected the VITS graph "
            "that Piper's training exports (inputs `input`, `input_lengths`, `scales`)"
        ) from None


class _Finder:
    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.made_by = producers(graph)
        self.users = consumers(graph)

    def points(self) -> _Points:
        missing = {"input", "input_lengths", "scales"} - {i.name for i in self.graph.input}
        if missing:
            raise _NotVits(f"it has no input {', '.join(sorted(missing))}")

        noises = [n for n in self.graph.node if n.op_type == "RandomNormalLike"]
        for_durations = [n for n in noises if n.name.startswith("/dp/")]
        if len(noises) != 2 or len(for_durations) != 1:
            raise _NotVits(f"it draws noise in {len(noises)} places, a voice does in 2")
        duration_noise = self.only_user(for_durations[0].output[0], "Mul").output[0]

        # prior = mean + noise * exp(log_scale) * noise_scale, each repeated over its frames
        noises.remove(for_durations[0])
        scaled = self.only_user(noises[0].output[0], "Mul")
        weighted = self.only_user(scaled.output[0], "Mul")
        added = self.only_user(weighted.output[0], "Add")
        exponential = self.input_made_by(scaled, "Exp")
        mean = self.before_repeating(added.input[0])
        log_scale = self.before_repeating(exponential.input[0])

        # frames = ceil(exp(log durations) * mask * length_scale)
        rounded = [n for n in self.graph.node if n.op_type == "Ceil"]
        if len(rounded) != 1:
            raise _NotVits(f"it rounds up in {len(rounded)} places, a voice does in 1")
        masked = self.input_made_by(self.maker(rounded[0].input[0], "Mul"), "Mul")
        phoneme_mask = self.input_made_by(masked, "Cast").output[0]

        first = next((n for n in self.graph.node if n.name == "/dec/conv_pre/Conv"), None)
        if first is None:
            raise _NotVits("it has no node /dec/conv_pre/Conv")
        latent = first.input[0]
        frame_mask = self.input_made_by(self.maker(latent, "Mul"), "Cast").output[0]
        return _Points(
            duration_noise,
            mean,
            log_scale,
            masked.output[0],
            phoneme_mask,
            added.output[0],
            latent,
            frame_mask,
        )

    def before_repeating(self, tensor: str) -> str:
        """The per-phoneme tensor behind transpose(alignment @ transpose(tensor))."""
        product = self.maker(self.maker(tensor, "Transpose").input[0], "MatMul")
        return str(self.maker(product.input[1], "Transpose").input[0])

    def maker(self, tensor: str, kind: str) -> onnx.NodeProto:
        node = self.made_by.get(tensor)
        if node is None or node.op_type != kind:
            raise _NotVits(f"{tensor} is not made by {kind}")
        return node

    def input_made_by(self, node: onnx.NodeProto, kind: str) -> onnx.NodeProto:
        """The maker of the one input of `node` that comes from an operator of this kind."""
        makers = [self.made_by[i] for i in node.input if i in self.made_by]
        found = [maker for maker in makers if maker.op_type == kind]
        if len(found) != 1:
            raise _NotVits(f"{node.name} has {len(found)} inputs made by {kind}, expected 1")
        return found[0]

    def only_user(self, tensor: str, kind: str) -> onnx.NodeProto:
        found = self.users.get(tensor, [])
        if len(found) != 1 or found[0].op_type != kind:
            raise _NotVits(f"{tensor} is used by {[n.op_type for n in found]}, expected one {kind}")
        return found[0]


def _cut_parts(model: onnx.ModelProto, at: _Points) -> dict[str, onnx.ModelProto]:
    """Encoder, flow and decoder; ValueError when one depends on more than it should."""
    # One utterance has no padding: masks are ones. Layers without a speaker add zeros of their
    # input's shape and multiply by exp(-0): as scalars, ORT folds all of these away.
    one, zero = np.ones((1, 1, 1), np.float32), np.zeros((1, 1, 1), np.float32)
    neutral = {at.phoneme_mask: one, at.frame_mask: one}
    zeros = {
        node.output[0]: zero
        for node in model.graph.node
        if node.op_type == "ConstantOfShape" and node.name.startswith("/flow/")
    }
    per_phoneme: Shape = [1, "channels", "phonemes"]
    per_frame: Shape = [1, "channels", "frames"]
    # in voices of one speaker, `sid` can be the name of a weight
    speaker: dict[str, tuple[str, Shape]] = {
        info.name: ("speaker", [1]) for info in model.graph.input if info.name == "sid"
    }
    audio = model.graph.output[0]
    rank = len(audio.type.tensor_type.shape.dim)
    return {
        "encoder": cut(
            model,
            inputs={
                "input": ("phoneme_ids", [1, "phonemes"]),
                at.duration_noise: ("noise", [1, 2, "phonemes"]),
                **speaker,
            },
            outputs={
                at.mean: ("prior_mean", per_phoneme),
                at.log_scale: ("prior_log_scale", per_phoneme),
                at.durations: ("durations", [1, 1, "phonemes"]),
            },
            constants=neutral,
        ),
        "flow": cut(
            model,
            inputs={at.prior: ("prior", per_frame), **speaker},
            outputs={at.latent: ("latent", per_frame)},
            constants=neutral | zeros,
        ),
        "decoder": cut(
            model,
            inputs={at.latent: ("latent", per_frame), **speaker},
            outputs={audio.name: ("audio", [1] * (rank - 1) + ["samples"])},
            constants={},
        ),
    }
