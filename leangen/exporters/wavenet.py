"""A WaveNet (van den Oord et al., 1609.03499) to a bundle that makes sound sample by sample.

A folder with `config.json`

    {"model_type": "wavenet", "sample_rate_hz": 16000, "levels": 256, "kernel": 2,
     "dilations": [1, 2, 4, ..., 512, 1, 2, ...]}

and `*.safetensors` with the convolutions [out, in, taps] of a torch module: `start_conv`, for layer
i `filter_convs.i`, `gate_convs.i`, `residual_convs.i`, `skip_convs.i`, then `end_conv_1` and
`end_conv_2` (the names of github.com/vincentherrmann/pytorch-wavenet); biases where there are any.

The graph takes any number of new samples and what each layer remembers of the earlier ones:

    samples [1, new] int64, state_I [1, channels, (kernel - 1) * dilation]
 -> logits [1, new, levels], next_state_I

so that a sample costs one pass over one column of each layer, whatever the receptive field.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from onnx import TensorProto, helper

from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import SourceError
from leangen.exporters.gguf_blocks import Floats
from leangen.exporters.onnx_writer import GraphWriter
from leangen.exporters.transformers_folder import (
    CONFIG,
    default_source,
    folder_of,
    model_type,
    open_tensors,
    read_json,
)

KIND = "wavenet"


@dataclass(frozen=True, slots=True, kw_only=True)
class Shape:
    """What the description says."""

    sample_rate_hz: int
    levels: int
    kernel: int
    dilations: tuple[int, ...]


def accepts(path: Path) -> bool:
    """Whether it is a folder (or its `config.json`) that describes a WaveNet."""
    return model_type(path) == KIND


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
) -> Bundle:
    """Export the model in folder `path` to a bundle in folder `out`.

    Raises SourceError for a description or tensors that are missing or do not fit, StorageError.
    """
    path = folder_of(path)
    shape = _shape(path)
    files, tensors = open_tensors(path)
    weights = {
        name: np.asarray(held.get_tensor(name), np.float32) for name, held in tensors.items()
    }
    _check(path, shape, weights)
    with create(out, replace=replace) as draft:
        draft.name = name or path.resolve().name.lower()
        draft.family, draft.graphs = "autoregressive", {"model": "model.onnx"}
        draft.config = write(draft.folder, shape, weights)
        draft.source = dict(source or default_source(path, files))
    return open_bundle(out)


def write(folder: Path, shape: Shape, weights: Mapping[str, Floats]) -> dict[str, Any]:
    """Write `model.onnx`; returns the bundle's config."""
    states: dict[str, list[int]] = {}
    channels = weights["start_conv.weight"].shape[0]
    with GraphWriter(folder) as writer:
        graph = _Graph(writer, weights)
        table = weights["start_conv.weight"][..., 0].T  # a 1 at one level picks one column
        table = table + weights.get("start_conv.bias", np.zeros(channels, np.float32))
        x = writer.node("Gather", "/start", [writer.constant("start.weight", table), "samples"])
        x = writer.node("Transpose", "/start/columns", [x], perm=[0, 2, 1])
        skips: list[str] = []
        for layer, dilation in enumerate(shape.dilations):
            memory = (shape.kernel - 1) * dilation
            states[f"state_{layer}"] = [1, channels, memory]
            x, skip = graph.layer(layer, dilation, memory, x)
            skips.append(skip)
        y = skips[0] if len(skips) == 1 else writer.node("Sum", "/skips", skips)
        for name in ("end_conv_1", "end_conv_2"):
            y = graph.conv(f"/{name}", writer.node("Relu", f"/{name}/relu", [y]), [name])
        writer.node("Transpose", "/logits", [y], ["logits"], perm=[0, 2, 1])
        info = helper.make_tensor_value_info
        writer.save(
            [
                info("samples", TensorProto.INT64, [1, "new"]),
                *(info(name, TensorProto.FLOAT, size) for name, size in states.items()),
            ],
            [
                info("logits", TensorProto.FLOAT, [1, "new", shape.levels]),
                *(info(f"next_{name}", TensorProto.FLOAT, size) for name, size in states.items()),
            ],
        )
    return {
        "architecture": KIND,
        "task": "audio",
        "sample_rate_hz": shape.sample_rate_hz,
        "levels": shape.levels,
        "states": states,
    }


class _Graph:
    def __init__(self, writer: GraphWriter, weights: Mapping[str, Floats]) -> None:
        self.writer = writer
        self.weights = weights

    def layer(self, layer: int, dilation: int, memory: int, x: str) -> tuple[str, str]:
        """What the next layer reads [1, channels, new], and what goes straight to the end."""
        node, constant, path = self.writer.node, self.writer.constant, f"/layers.{layer}"
        seen = node("Concat", f"{path}/seen", [f"state_{layer}", x], axis=2)
        start = constant(f"{path}/start", np.array([-memory], np.int64))
        end = constant(f"{path}/end", np.array([np.iinfo(np.int64).max], np.int64))
        axis = constant(f"{path}/axis", np.array([2], np.int64))
        node("Slice", f"{path}/keep", [seen, start, end, axis], [f"next_state_{layer}"])
        names = [f"filter_convs.{layer}", f"gate_convs.{layer}"]
        both = self.conv(f"{path}/conv", seen, names, dilations=[dilation])
        halves = [f"{path}/filter", f"{path}/gate"]
        node("Split", f"{path}/split", [both], halves, axis=1, num_outputs=2)
        shaped = node("Tanh", f"{path}/tanh", halves[:1])
        gate = node("Sigmoid", f"{path}/sigmoid", halves[1:])
        y = node("Mul", f"{path}/gated", [shaped, gate])
        skip = self.conv(f"{path}/skip", y, [f"skip_convs.{layer}"])
        y = self.conv(f"{path}/residual", y, [f"residual_convs.{layer}"])
        return node("Add", f"{path}/sum", [y, x]), skip

    def conv(self, path: str, x: str, names: list[str], **options: Any) -> str:
        """One convolution with the outputs of several side by side."""
        weight = np.concatenate([self.weights[f"{name}.weight"] for name in names])
        inputs = [x, self._constant(f"{path[1:]}.weight", weight)]
        if all(f"{name}.bias" in self.weights for name in names):
            bias = np.concatenate([self.weights[f"{name}.bias"] for name in names])
            inputs.append(self._constant(f"{path[1:]}.bias", bias))
        # not `/y`: that is what a quantized stand-in calls a tensor of its own
        return self.writer.node("Conv", path, inputs, [f"{path}/out"], **options)

    def _constant(self, name: str, array: Floats) -> str:
        return self.writer.constant(name, np.ascontiguousarray(array))


def _shape(path: Path) -> Shape:
    json = read_json(path / CONFIG)
    try:
        shape = Shape(
            sample_rate_hz=int(json["sample_rate_hz"]),
            levels=int(json["levels"]),
            kernel=int(json.get("kernel", 2)),
            dilations=tuple(int(dilation) for dilation in json["dilations"]),
        )
    except KeyError as error:
        raise SourceError(f"{path / CONFIG} lacks {error}, which a {KIND} has") from error
    except (TypeError, ValueError) as error:
        raise SourceError(f"{path / CONFIG} has values of a wrong type: {error}") from error
    if min(shape.sample_rate_hz, shape.levels - 1, shape.kernel - 1, *shape.dilations, 1) < 1:
        raise SourceError(
            f"{path / CONFIG} has {shape}: expected a rate and dilations of 1 or more, 2 levels or "
            "more and a kernel of 2 or more"
        )
    if not shape.dilations:
        raise SourceError(f"{path / CONFIG} has no dilations: expected one for each layer")
    return shape


def expected(shape: Shape, channels: int, inner: int, skip: int, end: int) -> dict[str, Any]:
    """The shape of each convolution by name."""
    out = {"start_conv": (channels, shape.levels, 1)}
    for layer in range(len(shape.dilations)):
        out |= {
            f"filter_convs.{layer}": (inner, channels, shape.kernel),
            f"gate_convs.{layer}": (inner, channels, shape.kernel),
            f"residual_convs.{layer}": (channels, inner, 1),
            f"skip_convs.{layer}": (skip, inner, 1),
        }
    return out | {"end_conv_1": (end, skip, 1), "end_conv_2": (shape.levels, end, 1)}


def _check(path: Path, shape: Shape, weights: Mapping[str, Floats]) -> None:
    """SourceError listing the tensors that are missing or of another shape."""
    firsts = ("start_conv", "filter_convs.0", "skip_convs.0", "end_conv_1")
    sizes = [
        weights[f"{name}.weight"].shape[0] if f"{name}.weight" in weights else 0 for name in firsts
    ]
    wrong = []
    for name, wanted in expected(shape, *sizes).items():
        found = weights.get(f"{name}.weight")
        if found is None:
            wrong.append(f"{name}.weight is missing")
        elif found.shape != wanted:
            wrong.append(f"{name}.weight is {list(found.shape)}, expected {list(wanted)}")
    if wrong:
        more = f" and {len(wrong) - 8} more" if len(wrong) > 8 else ""
        raise SourceError(f"{path} does not fit its own description: {'; '.join(wrong[:8])}{more}")
