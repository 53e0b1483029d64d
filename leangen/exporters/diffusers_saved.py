"""A folder that diffusers saved a pipeline in: what it says of itself, and its components."""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from leangen.bundle import Draft, sha256_file
from leangen.errors import DependencyError, LeangenError, SourceError, UnsupportedError
from leangen.exporters.diffusers_pipelines import BARE, PIPELINES, Pipeline

if TYPE_CHECKING:
    from leangen.exporters.diffusers_components import Form, Use

INDEX, CONFIG, ONNX = "model_index.json", "config.json", "model.onnx"
_LIBRARIES = ("diffusers", "transformers")
_EXPORTED = re.compile("^(Onnx|ORT)")
"""What the names of pipelines of ONNX graphs begin with."""


class Saved:
    """A pipeline's folder, or a bare component's, and what it says of itself."""

    def __init__(self, path: Path) -> None:
        self.path = path
        _require()
        if (path / INDEX).is_file():
            self.index = read_json(path / INDEX)
            known: Mapping[str, Pipeline] = PIPELINES
        else:
            self.index = read_json(path / CONFIG)
            known = BARE
        self.kind = _EXPORTED.sub("", str(self.index.get("_class_name")))
        if self.kind not in known:
            raise UnsupportedError(
                f"{path} is a {self.kind}, expected one of {', '.join((*PIPELINES, *BARE))}"
                f"{_nearest(self.kind, (*PIPELINES, *BARE))}: export its parts to ONNX first"
            )
        self.bare = known is BARE
        self.pipeline = known[self.kind]
        self.onnx = (path / self.pipeline.denoiser / ONNX).is_file()

    def components(self) -> Iterator[Component]:
        """What becomes graphs: text encoders, then the denoiser, then the autoencoder."""
        vae = ["vae"] if self.pipeline.latent else []
        for name in [*self.pipeline.texts, self.pipeline.denoiser, *vae]:
            yield Component(self, name)

    def folder(self, name: str) -> Path:
        """Where a component is; of an autoencoder in ONNX, where its decoder is."""
        if self.bare:
            return self.path
        return self.path / ("vae_decoder" if self.onnx and name == "vae" else name)

    def config(self, name: str) -> dict[str, Any]:
        """The config of a component, {} where it has none."""
        folder = self.folder(name)
        for file in ("scheduler_config.json", CONFIG):
            if (folder / file).is_file() and (file != CONFIG or "scheduler" not in name):
                return read_json(folder / file)
        return {}


class Component:
    """A model in a pipeline's folder."""

    def __init__(self, saved: Saved, name: str) -> None:
        from leangen.exporters.diffusers_components import FORMS

        self.saved, self.name = saved, name
        self.folder = saved.folder(name)
        library, kind = self._class()
        if library not in _LIBRARIES:
            raise UnsupportedError(
                f"{name} of {saved.path} is code of its own ({library}.{kind}), which leangen "
                f"never runs: expected one of {', '.join(FORMS)}"
            )
        self.config = read_json(self.folder / CONFIG)
        self.kind = _LEGACY.get(str(self.config.get("norm_type")), kind)
        if self.kind not in FORMS:
            raise UnsupportedError(
                f"{name} of {saved.path} is a {kind}, expected one of {', '.join(FORMS)}"
                f"{_nearest(kind, FORMS)}"
            )
        self.library = library
        self.use = self._use()

    def _class(self) -> tuple[str, str]:
        """The library and the class of it, by the pipeline's index."""
        saved = self.saved
        if saved.bare:
            return "diffusers", saved.kind
        if saved.onnx:
            config = read_json(self.folder / CONFIG)
            own = config.get("_class_name")
            architecture = (config.get("architectures") or ["unknown"])[0]
            return ("diffusers", str(own)) if own else ("transformers", str(architecture))
        entry = saved.index.get(self.name)
        if not isinstance(entry, list) or len(entry) != 2 or not all(entry):
            raise UnsupportedError(
                f"{saved.path} has no {self.name}, which a {saved.kind} of leangen's needs: save "
                "the whole pipeline with save_pretrained"
            )
        return str(entry[0]), str(entry[1])

    def build(self) -> Any:
        """The torch module of its config, with random weights."""
        import diffusers
        import transformers

        try:
            if self.library == "diffusers":
                return getattr(diffusers, self.kind).from_config(self.config)
            kind = getattr(transformers, self.kind)
            return kind(kind.config_class.from_dict(self.config))
        except (TypeError, ValueError, KeyError, AttributeError) as error:
            raise SourceError(
                f"{self.folder / CONFIG} does not describe a {self.kind} ({error}): "
                "download or save it again"
            ) from error

    def load(self) -> Any:
        """The torch module with its weights, in fp32."""
        import diffusers
        import transformers

        if self.library == "diffusers":
            kind, options = getattr(diffusers, self.kind), {"low_cpu_mem_usage": False}
        else:
            kind, options = getattr(transformers, self.kind), {}
        return kind.from_pretrained(self.folder, **options).float().eval()

    def forms(self, module: Any) -> dict[str, Form]:
        """Its graphs, by role."""
        from leangen.exporters.diffusers_components import FORMS

        forms = FORMS[self.kind](module, self.use)
        return {self.name: forms["text_encoder"]} if "text_encoder" in forms else forms

    def write(self, draft: Draft) -> dict[str, Form]:
        """Write its graphs into a bundle; returns their forms."""
        from leangen.exporters import torch_graph

        module = torch_graph.weightless(self.build)
        forms = self.forms(module)
        if self.saved.onnx:
            self._take(module, forms, draft)
        else:
            self._trace(module, forms, draft)
        return forms

    def _take(self, module: Any, forms: Mapping[str, Form], draft: Draft) -> None:
        """Graphs that are ONNX already."""
        from leangen.exporters import diffusers_onnx

        for role, form in forms.items():
            source = self._graph(role)
            if role == "encoder" and not source.is_file():
                continue  # not needed where no picture is begun with
            diffusers_onnx.write(source, form, self.use, module.config, draft.folder, role)
            draft.graphs[role] = f"{role}.onnx"

    def _graph(self, role: str) -> Path:
        folder = self.saved.path / "vae_encoder" if role == "encoder" else self.folder
        return folder / ONNX

    def _trace(self, module: Any, forms: Mapping[str, Form], draft: Draft) -> None:
        """Graphs traced from torch, with the weights that are stored."""
        import torch

        from leangen.exporters import torch_graph
        from leangen.exporters.diffusers_components import Called
        from leangen.exporters.torch_weights import StoredTensors

        stored = StoredTensors(self.folder)
        state = module.state_dict(keep_vars=True)
        buffers = {name: value for name, value in module.named_buffers() if not stored.has(name)}
        stored.check({name: value for name, value in state.items() if name not in buffers})

        def weights(name: str) -> Any:
            name = name.removeprefix("model.")
            if name in buffers:
                return buffers[name].numpy()
            return stored.array(name, state)

        generator = torch.Generator().manual_seed(0)
        for role, form in forms.items():
            examples = {
                name: each.example(2, full=False, generator=generator)
                for name, each in form.inputs.items()
            }
            with self._called():
                torch_graph.write(
                    Called(module, form),
                    examples,
                    form.outputs,
                    weights,
                    draft.folder,
                    role,
                    open_axes=form.open_axes(),
                )
            draft.graphs[role] = f"{role}.onnx"

    @contextmanager
    def _called(self) -> Iterator[None]:
        """Around the component's own code; whatever it raises becomes one UnsupportedError."""
        try:
            yield
        except LeangenError:
            raise
        except Exception as error:  # of torch, diffusers or transformers
            said = (str(error).splitlines() or [""])[0]
            raise UnsupportedError(
                f"{self.name} of {self.saved.path} cannot be called as a {self.saved.kind} is "
                f"({type(error).__name__}: {said}): its config.json is of another kind of pipeline"
            ) from error

    def hashes(self) -> dict[str, str]:
        """The SHA-256 of its weights' files, by their names."""
        from leangen.exporters.torch_weights import weight_files

        files = sorted(self.folder.glob(f"{ONNX}*")) if self.saved.onnx else None
        return {
            file.relative_to(self.saved.path).as_posix(): sha256_file(file)
            for file in (weight_files(self.folder) if files is None else files)
        }

    def _use(self) -> Use:
        from leangen.exporters.diffusers_components import Use

        pipeline = self.saved.pipeline
        if self.name in pipeline.texts:
            text = pipeline.texts[self.name]
            return Use(layer=text.layer, pooled=text.pooled, masked=text.masked, length=text.length)
        scheduler = self.saved.config("scheduler")
        sigma = None
        if scheduler.get("_class_name") == "CMStochasticIterativeScheduler":
            sigma = {key: float(scheduler[key]) for key in ("sigma_data", "sigma_min")}
        if self.name == pipeline.denoiser:
            length = sum(text.length for text in _rows(pipeline))
            return Use(beside=self._beside(), sigma=sigma, length=length or 77)
        return Use()

    def _beside(self) -> dict[str, int]:
        """The images that stand beside the sample, by what is left of the input's channels."""
        channels = self.config.get("in_channels", 4)
        if self.saved.pipeline.upscale is not None:
            latent = self.saved.config("vae").get("latent_channels", channels // 2)
            return {"image": channels - latent}
        if self.saved.pipeline.latent:
            latent = self.saved.config("vae").get("latent_channels", 4)
            if channels == 2 * latent + 1:
                return {"mask": 1, "masked_image": latent}
            if channels != latent:
                raise UnsupportedError(
                    f"{self.name} of {self.saved.path} takes {channels} channels, expected "
                    f"{latent}, or {2 * latent + 1} of an inpainting model"
                )
        return {}


def _rows(pipeline: Pipeline) -> list[Any]:
    """The text encoders whose hidden states stand one after the other."""
    first = [row[0] for row in pipeline.feeds.get("text", [])]
    return [pipeline.texts[part.partition(".")[0]] for part in first]


_LEGACY = {"ada_norm_zero": "DiTTransformer2DModel", "ada_norm_single": "PixArtTransformer2DModel"}
"""Classes that were once one, Transformer2DModel, by its config's `norm_type`."""


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; SourceError for anything else."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise SourceError(
            f"there is no {path}: expected a folder that save_pretrained wrote"
        ) from error
    except (OSError, ValueError) as error:
        raise SourceError(f"cannot read {path}: {error}") from error
    if not isinstance(content, dict):
        raise SourceError(f"{path} is not a JSON object: download it again")
    return cast("dict[str, Any]", content)


def _nearest(kind: str, known: Any) -> str:
    near = difflib.get_close_matches(kind, list(known), n=1, cutoff=0.3)
    return f" (the nearest is {near[0]})" if near else ""


def _require() -> None:
    try:
        import diffusers  # noqa: F401
        import safetensors  # noqa: F401
        import torch  # noqa: F401
        import transformers  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("diffusers", "safetensors", "torch", "transformers"):
            raise
        raise DependencyError(
            f"folders of diffusers need {error.name}: `pip install 'leangen[export]'`"
        ) from None
