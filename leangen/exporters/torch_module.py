"""Any torch module that a factory of the user's makes: decoders, generators, encoders, flows.

The source is `module:factory` (a Python module that can be imported from here) or
`file.py:factory`. The factory takes no arguments and returns the module and an example input, or a
mapping:

    def factory():
        return decoder, torch.zeros(1, 4, 8, 8)

    def factory():
        return {"module": generator, "example": (z, label), "conditions": {"label": {"max": 9}}}

The example is a tensor or several, in the order that `forward` takes them, batch first. `kind` says
what the module is:

    decoder   (latent, *conditions) -> image: VAE decoders, GAN generators; what is taken by default
    encoder   (image) -> latent; its first result is kept
    denoiser  (x, level, *conditions) -> prediction; what a second input named sigma, t, ... means
    velocity  (x, t, *conditions) -> d x / d t of flow matching, x being noise at t = 1; with
              `noise_at` 0, noise is at t = 0 and data at t = 1
    flow      (x) -> (z, log_det) with `inverse`, or a flow of normflows, nflows or zuko; what a
              module with `inverse` is by default. The example is a batch of data

The mapping's other entries, and `--option NAME=VALUE`, are options of that kind: those of
`onnx_file.export` (`latent`, `range`, `conditions`, `steps`, `sampler`, `shape` ...), and of a flow
`columns`, `range` and `levels` (images whose values lie in `range`, dequantized from so many
levels).

Importing the user's own module runs it: name only what you trust. Nothing else is imported: no code
that lies in a folder of weights, and none of a pickle. `--weights` reads safetensors, and what
`torch.save` wrote of a state dict.
"""

from __future__ import annotations

import inspect
import math
import sys
import tempfile
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from importlib.util import module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import onnxruntime as ort

from leangen.bundle import Bundle, create, open_bundle, sha256_file
from leangen.errors import LeangenError, SourceError, UnsupportedError, needs
from leangen.exporters import pickled

if TYPE_CHECKING:
    import torch

    from leangen.exporters.difference import Difference

KINDS = ("decoder", "encoder", "denoiser", "velocity", "flow")


def accepts(path: Path) -> bool:
    """Whether it is written `module:factory` or `file.py:factory`, and nothing has that name."""
    where, _, factory = str(path).rpartition(":")
    named = where.endswith(".py") or all(part.isidentifier() for part in where.split("."))
    return bool(where) and named and factory.isidentifier() and not path.exists()


def export(
    path: Path,
    out: Path,
    *,
    name: str | None = None,
    source: Mapping[str, Any] | None = None,
    replace: bool = False,
    weights: Path | None = None,
    **options: Any,
) -> Bundle:
    """Write the bundle of the module that the factory makes; see the top of this file.

    `weights` are a state dict to load into it. torch's random numbers start from seed 0 before the
    factory is called. Raises SourceError for a factory or weights that cannot be used,
    UnsupportedError for a module that cannot be exported, DependencyError without torch.
    """
    made = build(path, weights, options)
    source = source or {"kind": "torch", "factory": path.name}
    if weights is not None:
        source = {**source, "weights": weights.name, "sha256": sha256_file(weights)}
    return write(
        made, out, name=name or path.name.rpartition(":")[2], source=source, replace=replace
    )


def check(
    path: Path, bundle: Bundle, *, weights: Path | None = None, **options: Any
) -> list[Difference]:
    """Compare the bundle with the module, made anew, on the example input and on random ones."""
    from leangen.exporters import torch_check

    made = build(path, weights, options)
    return torch_check.differences(made, bundle)


def write(
    made: Made, out: Path, *, name: str, source: Mapping[str, Any], replace: bool = False
) -> Bundle:
    """Write the bundle of a module at hand, in evaluation mode and without gradients."""
    if made.kind == "flow":
        return _export_flow(made, out, name, source, replace)
    return _export_images(made, out, name, source, replace)


@contextmanager
def running(module: torch.nn.Module, examples: Sequence[torch.Tensor]) -> Iterator[None]:
    """Around the module's own code, on examples; whatever it raises becomes one SourceError."""
    try:
        yield
    except LeangenError:
        raise
    except Exception as error:  # the user's code may raise anything
        shapes = ", ".join(str(list(x.shape)) for x in examples)
        raise _raised(
            f"{type(module).__name__} with an example of shape {shapes}", error
        ) from error


@dataclass(frozen=True, slots=True)
class Made:
    """What a factory made."""

    module: torch.nn.Module
    examples: tuple[torch.Tensor, ...]
    kind: str
    options: dict[str, Any]


def build(path: Path, weights: Path | None, given: Mapping[str, Any]) -> Made:
    """Call the factory, load the weights, and read what it returned."""
    with needs("torch", message="a torch module needs torch: `pip install 'leangen[export]'`"):
        import torch
    from leangen.exporters import torch_flow

    torch.manual_seed(0)
    returned = _call(path)
    module, example, options = _read(returned, path, torch)
    options |= given
    examples = (example,) if isinstance(example, torch.Tensor) else tuple(example)
    examples = tuple(x.float() if x.is_floating_point() else x for x in examples)
    module = module.float().eval().requires_grad_(False)
    if weights is not None:
        _load(module, weights)
    kind = options.pop("kind", "flow" if torch_flow.is_flow(module) else "decoder")
    if kind not in KINDS:
        raise SourceError(f"kind is {kind!r}, expected one of {', '.join(KINDS)}")
    return Made(module, examples, kind, options)


def _call(path: Path) -> Any:
    """What the factory returns. Whatever it raises becomes one SourceError that tells where."""
    where, _, factory = str(path).rpartition(":")
    with _importable(where):
        module = _import(where)
        function = getattr(module, factory, None)
        if not callable(function):
            known = [name for name, value in vars(module).items() if inspect.isfunction(value)]
            raise SourceError(
                f"{where} has no function {factory!r}: expected one of "
                f"{', '.join(known) or 'none, it defines no function'}"
            )
        try:
            return function()
        except Exception as error:  # the user's code may raise anything
            raise _raised(f"{factory}()", error) from error


@contextmanager
def _importable(where: str) -> Iterator[None]:
    """While this is open, modules beside the file, or in the working folder, can be imported."""
    folder = str(Path(where).resolve().parent if where.endswith(".py") else Path.cwd())
    sys.path.insert(0, folder)
    try:
        yield
    finally:
        sys.path.remove(folder)


def _import(where: str) -> ModuleType:
    missing = f"there is no Python module {where!r} here"
    try:
        if not where.endswith(".py"):
            return import_module(where)
        if not Path(where).is_file():
            raise SourceError(f"there is no file {where}: expected file.py:factory")
        spec = spec_from_file_location(Path(where).stem, where)
        assert spec is not None and spec.loader is not None  # for every .py file
        module = module_from_spec(spec)
        sys.modules.setdefault(spec.name, module)
        spec.loader.exec_module(module)
        return module
    except SourceError:
        raise
    except ModuleNotFoundError as error:
        if error.name is not None and (where == error.name or where.startswith(f"{error.name}.")):
            raise SourceError(
                f"{missing}: expected module:factory with a module that Python finds from the "
                "working folder, or file.py:factory"
            ) from None
        raise SourceError(f"{where} imports {error.name}, which is not installed") from None
    except Exception as error:  # the user's code may raise anything
        raise _raised(f"importing {where}", error) from error


def _raised(what: str, error: Exception) -> SourceError:
    """The error for what the user's code raised, with the innermost place that is not torch's."""
    import torch

    inside, place = (str(Path(torch.__file__).parent), str(Path(__file__).parent)), ""
    for frame in traceback.extract_tb(error.__traceback__):
        if not frame.filename.startswith(inside):
            place = f" at {Path(frame.filename).name}:{frame.lineno}"
    said = (str(error).splitlines() or [""])[0]
    return SourceError(f"{what} raised {type(error).__name__}{place}: {said}")


def _read(returned: Any, path: Path, torch: Any) -> tuple[Any, Any, dict[str, Any]]:
    """Module, example and options of what a factory returned; SourceError for anything else."""
    options: dict[str, Any] = {}
    if isinstance(returned, Mapping):
        options = dict(returned)
        module, example = options.pop("module", None), options.pop("example", None)
    elif isinstance(returned, tuple) and len(returned) == 2:
        module, example = returned
    else:
        module = example = None
    tensors = [example] if isinstance(example, torch.Tensor) else example
    whole = isinstance(tensors, list | tuple) and len(tensors) > 0
    if not (isinstance(module, torch.nn.Module) and whole):
        said = type(returned).__name__
        if isinstance(returned, tuple):
            said = f"({', '.join(type(part).__name__ for part in returned)})"
        elif isinstance(returned, Mapping):
            said = f"a mapping with {', '.join(map(repr, returned))}"
        raise SourceError(
            f"{path.name} returns {said}: expected (module, example input) or a mapping with "
            "'module' and 'example', where the example is a tensor or several"
        )
    if not all(isinstance(x, torch.Tensor) and x.dim() > 0 and len(x) > 0 for x in tensors):
        raise SourceError(f"{path.name}: every example input must be a tensor with a batch first")
    return module, tensors, options


def _load(module: torch.nn.Module, weights: Path) -> None:
    """Load a state dict; SourceError that lists what is missing or does not fit."""
    if not weights.is_file():
        raise SourceError(
            f"there is no file {weights}: give the module's weights, as safetensors or as "
            "torch.save wrote its state_dict()"
        )
    state = _safetensors(weights) if weights.suffix == ".safetensors" else pickled.load(weights)
    wanted = module.state_dict()
    problems = [f"{name} is missing" for name in wanted if name not in state]
    problems += [f"{name} is not the module's" for name in state if name not in wanted]
    problems += [
        f"{name} has shape {list(state[name].shape)}, expected {list(wanted[name].shape)}"
        for name in wanted
        if name in state and state[name].shape != wanted[name].shape
    ]
    if problems:
        more = f" and {len(problems) - 5} more" if len(problems) > 5 else ""
        raise SourceError(f"{weights} does not fit the module: {'; '.join(problems[:5])}{more}")
    module.load_state_dict(state)


def _safetensors(weights: Path) -> dict[str, torch.Tensor]:
    message = "--weights needs safetensors: `pip install 'leangen[export]'`"
    with needs("safetensors", message=message):
        from safetensors import SafetensorError
        from safetensors.torch import load_file
    try:
        state: dict[str, torch.Tensor] = load_file(weights)
        return state
    except SafetensorError as error:
        raise SourceError(
            f"{weights} is not whole ({error}): save it again with "
            "safetensors.torch.save_file(module.state_dict(), ...)"
        ) from None


def _export_images(
    made: Made, out: Path, name: str, source: Mapping[str, Any], replace: bool
) -> Bundle:
    """Trace `forward` to one ONNX file, and make a bundle of that."""
    from leangen.exporters import onnx_file, torch_image

    options = dict(made.options)
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        family = torch_image.write(made.module, made.examples, made.kind, Path(folder), options)
        _check_opens(Path(folder), ["model.onnx"])
        return onnx_file.export(
            Path(folder) / "model.onnx",
            out,
            name=name,
            source=source,
            replace=replace,
            family=family,
            **options,
        )


def _check_opens(folder: Path, graphs: Iterable[str]) -> None:
    """UnsupportedError for a graph with an operator that ONNX Runtime has not for its types."""
    options = ort.SessionOptions()
    options.log_severity_level = 4  # what is wrong is told below
    for graph in graphs:
        try:
            ort.InferenceSession(folder / graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # ORT raises many unrelated types from its C++ side
            said = str(error).splitlines()[0].replace(f"{folder}/", "")
            raise UnsupportedError(
                f"ONNX Runtime does not run the module's graph ({said}): rewrite what it names, "
                "or compute in float32"
            ) from error


def _export_flow(
    made: Made, out: Path, name: str, source: Mapping[str, Any], replace: bool
) -> Bundle:
    from leangen.exporters import onnx_file, torch_flow

    options, example = dict(made.options), made.examples[0]
    onnx_file.check_options(options)
    if len(made.examples) > 1:
        raise UnsupportedError(
            f"a flow with {len(made.examples)} inputs: conditional flows are not exported; give a "
            "module that fixes the condition"
        )
    shape = list(example.shape[1:])
    size = math.prod(shape)
    columns = options.pop("columns", None) or [f"x{i}" for i in range(size)]
    if not (isinstance(columns, list | tuple) and all(isinstance(c, str) for c in columns)):
        raise SourceError(f'columns is {columns!r}, expected names such as ["height", "weight"]')
    if len(columns) != size:
        raise SourceError(f"{len(columns)} columns are named, the flow has {size}")
    config: dict[str, Any] = {
        "task": "density",
        "columns": list(columns),
        "latent": {"kind": "normal", "bound": 1.0},
        "dtype": "float32",
    }
    if len(shape) == 3:
        config["image"] = {
            "shape": shape,
            "range": list(options.pop("range", (0.0, 1.0))),
            "levels": int(options.pop("levels", 256)),
        }
    elif len(shape) != 1:
        raise UnsupportedError(
            f"the example has shape {list(example.shape)}: expected rows [n, d] or images "
            "[n, c, h, w]"
        )
    if options:
        raise UnsupportedError(
            f"option {next(iter(options))!r} does not fit a flow: it takes columns, and for images "
            "range and levels"
        )
    with running(made.module, [example]):
        flow = torch_flow.open_flow(made.module, example)
    with create(out, replace=replace) as draft:
        draft.graphs = dict(torch_flow.write(flow, made.module, example, draft.folder))
        _check_opens(draft.folder, draft.graphs.values())
        draft.name, draft.family, draft.config = name, "flow", config
        draft.source = dict(source)
    return open_bundle(out)
