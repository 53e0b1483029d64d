"""Plain ONNX files: a denoiser, a one-shot generator or a model of rows of pixels, as a bundle.

The inputs tell what a file is: a noisy sample and a noise level make a denoiser, a latent alone
makes a generator, rows and what remembers those above a PixelCNN (see `families.pixel_rows`). What
a file does not say (what it predicts, its noise schedule, the range of a condition) comes from the
options, or from the defaults that are documented in `export`.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper

from leangen import samplers
from leangen.bundle import Bundle, create, open_bundle
from leangen.errors import BundleError, RequestError, SourceError, UnsupportedError
from leangen.graph_edit import Graph
from leangen.samplers import schedules

SAMPLE_NAMES = ("noisy", "sample", "x", "x_t", "noisy_sample", "latents", "input")
SIGMA_NAMES = ("sigma", "sigmas", "noise_level")
TIMESTEP_NAMES = ("timestep", "timesteps", "t", "time", "step")
ROWS, STATE = "rows", "state_"
LATENT_NAMES = ("z", "latent", "latents", "latent_sample", "noise", "input")
_FAMILIES = ("diffusion", "oneshot", "autoregressive")
_VP_DEFAULT = {"kind": "linear", "timesteps": 1000, "beta_start": 1e-4, "beta_end": 0.02}


def accepts(path: Path) -> bool:
    """Whether the file is named like an ONNX file; `export` looks inside."""
    return path.suffix == ".onnx"


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    family: str | None = None,
    **options: Any,
) -> Bundle:
    """Write the model in `path` as an fp32 bundle and open it.

    `family` is `diffusion`, `oneshot` or `autoregressive` where the inputs leave it open.
    Options of a denoiser: `prediction` (`sample`; `epsilon` for a timestep model), `sampler`
    (`consistency` for a one-step model, else `euler`), `steps` (1 for `sample` predictions in
    sigma, else 20), `sigma_min` 0.002, `sigma_max` 80, `schedule` (linear betas 1e-4 to 0.02 over
    1000 timesteps) with `spacing` and `offset`, for `flow` predictions `scale` 1000 and `shift` 1,
    `guidance`, `upscale` for one that enlarges an image (`families.latents`), and `latents` for one
    whose samples another bundle decodes. Of a generator: `latent` (`normal` or `uniform`), or
    `encoder` for one that takes an `image`. Of both: `shape` for sizes that the file leaves open,
    `range` [low, high] of the values, `render` (`relief` for heightmaps), `conditions` name ->
    {min, max, default, unconditional}. Of rows of pixels: `height` (the width), `levels` 256,
    `range`, `conditions`.
    Raises SourceError for a file that is not ONNX or is cut off, UnsupportedError when its inputs
    are not understood or an option does not fit.
    """
    graph = _load(path)
    inputs = {
        value.name: _Input.of(value)
        for value in graph.model.graph.input
        if not graph.has(value.name)
    }
    if family not in (None, *_FAMILIES):
        raise UnsupportedError(
            f"family {family!r} does not fit a plain ONNX file: expected {' or '.join(_FAMILIES)}"
        )
    leveled = _named(inputs, (*SIGMA_NAMES, *TIMESTEP_NAMES)) is not None
    guess = "diffusion" if leveled else "autoregressive" if ROWS in inputs else "oneshot"
    family = family or guess
    make = {"diffusion": _diffusion_config, "autoregressive": _rows_config}.get(
        family, _oneshot_config
    )
    check_options(options)
    config = make(path, inputs, graph.model.graph.output[0].name, options)
    if options:
        raise UnsupportedError(
            f"option {next(iter(options))!r} does not fit a {family} model: see "
            "`leangen export --help`"
        )
    with create(out, replace=replace) as draft:
        graph.save(draft.folder / "model.onnx")
        draft.name, draft.family = name or path.stem, family
        draft.graphs = {"model": "model.onnx"}
        draft.config = config
        draft.source = dict(source or {"kind": "file", "file": path.name})
    return open_bundle(out)


def check_options(options: Mapping[str, Any]) -> None:
    """UnsupportedError for an option whose value is not of its kind; None is the default."""
    for name, value in options.items():
        fits, expected = _OPTIONS.get(name, (_anything, ""))
        if value is not None and not fits(value):
            raise UnsupportedError(f"option {name} is {value!r}, expected {expected}")


def _anything(value: Any) -> bool:
    return True


def _whole(value: Any) -> bool:
    return type(value) is int and value > 0


def _number(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _sizes(value: Any) -> bool:
    return isinstance(value, list | tuple) and all(map(_whole, value))


def _ends(value: Any) -> bool:
    pair = isinstance(value, list | tuple) and len(value) == 2 and all(map(_number, value))
    return pair and value[0] < value[1]


def _entries(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(v, Mapping) for v in value.values())


_OPTIONS: Mapping[str, tuple[Callable[[Any], bool], str]] = {
    "shape": (_sizes, "sizes without the batch, such as [3, 64, 64]"),
    "range": (_ends, "the lowest and the highest value, such as [-1, 1]"),
    "conditions": (_entries, 'values by the name of an input, such as {"label": {"max": 9}}'),
    **dict.fromkeys(("steps", "height", "levels"), (_whole, "a whole number above 0")),
    **dict.fromkeys(
        ("guidance", "sigma_min", "sigma_max", "scale", "shift"), (_number, "a number")
    ),
}


@dataclass(frozen=True, slots=True)
class _Input:
    """A graph input: its sizes (None where open), batch included, and NumPy type."""

    shape: tuple[int | None, ...]
    dtype: str

    @classmethod
    def of(cls, value: onnx.ValueInfoProto) -> _Input:
        tensor = value.type.tensor_type
        shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in tensor.shape.dim)
        return cls(shape, str(helper.tensor_dtype_to_np_dtype(tensor.elem_type)))


def _load(path: Path) -> Graph:
    """The graph, after checking that the file is whole."""
    remedy = "check that it is complete, or export the model to ONNX again"
    if not path.is_file():
        raise SourceError(f"{path} is not a file: give the path of an ONNX file")
    try:
        graph = Graph(path)
    except BundleError:
        raise SourceError(f"{path} is not an ONNX file, or is cut off: {remedy}") from None
    if not graph.nodes or not graph.model.graph.output:
        raise SourceError(f"{path} holds no graph: {remedy}")
    try:
        graph.check_files()
    except BundleError as error:
        raise SourceError(f"{path}: {error}") from None
    return graph


def _named(inputs: Mapping[str, _Input], names: Sequence[str]) -> str | None:
    """The first of these names that is an input, letter case aside."""
    lower = {name.lower(): name for name in inputs}
    return next((lower[name] for name in names if name in lower), None)


def _image_input(
    path: Path, inputs: Mapping[str, _Input], names: Sequence[str], options: dict[str, Any]
) -> tuple[str, list[int]]:
    """The sample's or latent's input and its shape without the batch."""
    name = _named(inputs, names)
    if name is None:
        raise UnsupportedError(
            f"{path} has inputs {', '.join(inputs) or 'none'}: expected one named "
            f"{', '.join(names)}; rename it, or export a model that leangen knows"
        )
    shape = list(options.pop("shape", None) or inputs[name].shape[1:])
    if not shape or None in shape:
        raise UnsupportedError(
            f"input {name!r} of {path} leaves its sizes open ({inputs[name].shape}): "
            "give `shape`, without the batch, such as [3, 64, 64]"
        )
    if inputs[name].dtype != "float32":
        raise UnsupportedError(
            f"input {name!r} of {path} is {inputs[name].dtype}, expected float32: "
            "export the model in float32"
        )
    return name, [int(size) for size in shape]


def _diffusion_config(
    path: Path, inputs: dict[str, _Input], output: str, options: dict[str, Any]
) -> dict[str, Any]:
    level = _named(inputs, (*SIGMA_NAMES, *TIMESTEP_NAMES))
    if level is None:
        raise UnsupportedError(
            f"{path} has inputs {', '.join(inputs) or 'none'}: a denoiser needs its noise level as "
            f"one of {', '.join((*SIGMA_NAMES, *TIMESTEP_NAMES))}"
        )
    in_sigma = level.lower() in SIGMA_NAMES
    names = [name for name in SAMPLE_NAMES if name != level.lower()]
    sample, shape = _image_input(path, inputs, names, options)
    prediction = options.pop("prediction", "sample" if in_sigma else "epsilon")
    fitting = ("sample", "epsilon") if in_sigma else ("sample", "epsilon", "v", "flow")
    if prediction not in fitting:
        raise UnsupportedError(
            f"prediction {prediction!r} does not fit {path}: expected one of {', '.join(fitting)}"
        )
    one_step = in_sigma and prediction == "sample"
    steps = options.pop("steps", None) or (1 if one_step else 20)
    sampler = options.pop("sampler", "consistency" if steps == 1 else "euler")
    try:
        samplers.get(sampler)
    except RequestError as error:
        raise UnsupportedError(str(error)) from None
    noise = {"input": level, **_fixed(path, level, inputs[level])}
    noise |= _noise_range(prediction, options, in_sigma=in_sigma)
    used, more = {sample, level}, {}
    if "upscale" in options:
        more["upscale"] = options.pop("upscale")
        used.add(more["upscale"]["input"])
    if options.pop("latents", False):
        more["latents"] = True
    return {
        "sample": {"input": sample, "output": output, "shape": shape},
        "noise_level": noise,
        "prediction": prediction,
        "sampler": sampler,
        "steps": steps,
        "guidance": options.pop("guidance", None),
        **more,
        **_common(path, inputs, used, options),
    }


def _noise_range(prediction: str, options: dict[str, Any], *, in_sigma: bool) -> dict[str, Any]:
    """How the model counts the noise level, and between what ends."""
    if in_sigma:
        low, high = options.pop("sigma_min", 0.002), options.pop("sigma_max", 80.0)
        return {"kind": "sigma", "min": low, "max": high}
    if prediction == "flow":
        scale, shift = options.pop("scale", 1000.0), options.pop("shift", 1.0)
        return {"kind": "flow", "scale": scale, "shift": shift}
    noise = {"kind": "timestep", "schedule": options.pop("schedule", _VP_DEFAULT)}
    noise |= {key: options.pop(key) for key in ("spacing", "offset") if key in options}
    trained = schedules.trained(noise["schedule"])
    schedules.spaced(trained, 1, noise.get("spacing", "linspace"))
    if prediction == "epsilon" and trained[-1].alpha == 0:
        raise UnsupportedError(
            "prediction epsilon says nothing of the sample at zero signal-to-noise ratio: "
            "expected v or sample, or a schedule without zero_terminal_snr"
        )
    return noise


def _oneshot_config(
    path: Path, inputs: dict[str, _Input], output: str, options: dict[str, Any]
) -> dict[str, Any]:
    if options.pop("encoder", False):
        image, shape = _image_input(path, inputs, ("image",), options)
        entry = {"image": {"input": image, "shape": shape}, "output": output}
        return entry | _common(path, inputs, {image}, options)
    latent, shape = _image_input(path, inputs, LATENT_NAMES, options)
    kind = options.pop("latent", "normal")
    if kind not in ("normal", "uniform"):
        raise UnsupportedError(f"latent {kind!r} is unknown: expected normal or uniform")
    return {
        "latent": {"input": latent, "shape": shape, "kind": kind},
        "output": output,
        **_common(path, inputs, {latent}, options),
    }


def _rows_config(
    path: Path, inputs: dict[str, _Input], output: str, options: dict[str, Any]
) -> dict[str, Any]:
    states = {name: value.shape[1:] for name, value in inputs.items() if name.startswith(STATE)}
    if ROWS not in inputs or not states or output != "logits":
        raise UnsupportedError(
            f"{path} has inputs {', '.join(inputs) or 'none'} and the output {output}: a model of "
            f"rows of pixels takes {ROWS} and {STATE}0, {STATE}1 ... and gives logits first"
        )
    open_sizes = [name for name, shape in states.items() if None in shape]
    width = inputs[ROWS].shape[-1]
    if open_sizes or width is None:
        raise UnsupportedError(
            f"{path} leaves sizes of {', '.join(open_sizes) or ROWS} open: fix all but the batch "
            "and how many rows there are"
        )
    common = _common(path, inputs, {ROWS, *states}, options)
    return {
        "task": ROWS,
        "size": [int(options.pop("height", width)), width],
        "levels": int(options.pop("levels", 256)),
        "states": {name: list(shape) for name, shape in states.items()},
        **common,
        "range": common["range"] or [-1.0, 1.0],
    }


def _common(
    path: Path, inputs: Mapping[str, _Input], used: set[str], options: dict[str, Any]
) -> dict[str, Any]:
    """Conditions, range, rendering. A float condition of unknown range goes from 0 to 1."""
    given = options.pop("conditions", None) or {}
    conditions = {}
    if strange := given.keys() - (inputs.keys() - used):
        raise UnsupportedError(
            f"conditions name {', '.join(sorted(strange))}, expected inputs of the model: "
            f"{', '.join(inputs.keys() - used) or 'it has none but its sample'}"
        )
    for name, value in inputs.items():
        if name in used:
            continue
        entry: dict[str, Any] = {"min": 0, "max": None, "default": 0}
        if np.dtype(value.dtype).kind == "f":
            entry = {"min": 0.0, "max": 1.0, "default": 0.5}
        conditions[name] = entry | given.get(name, {}) | _fixed(path, name, value)
    return {
        "conditions": conditions,
        "range": options.pop("range", None),
        "render": options.pop("render", None),
    }


def _fixed(path: Path, name: str, value: _Input) -> dict[str, Any]:
    """Shape for one sample, and type, of a small input."""
    shape = [1 if size is None and place == 0 else size for place, size in enumerate(value.shape)]
    if None in shape:
        raise UnsupportedError(
            f"input {name!r} of {path} has open sizes beyond the batch ({value.shape}): "
            "export the model with fixed sizes"
        )
    return {"shape": shape, "dtype": value.dtype}
