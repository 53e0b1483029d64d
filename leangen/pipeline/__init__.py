"""Pipelines: parts, each a bundle with its own scheme, connected in a short TOML file.

    summary = "Answers aloud what is asked aloud"

    [inputs.audio]
    about = "a question, as a .wav file"

    [parts.ear]
    model = "whisper-tiny-en:int8"
    request = { audio = "{input.audio}" }

    [parts.mind]
    model = "smollm2-135m:int4"
    request = { messages = [{ role = "user", content = "{ear.text}" }], max_new_tokens = 48 }

    [parts.voice]
    model = "piper-joe:int8"
    request = { text = "{mind.text}" }

A part's request holds options of its model's family; `{part.output}` in it is what an earlier part
gave (see `template`). When a pipeline is loaded, each output is held against the field that takes
it: kind, shape, type, range, sample rate, tokenizer (`ports`). One window is measured over a run;
its joules are shared among the parts, which add up to the whole exactly (`accounts`).
"""

from __future__ import annotations

from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from leangen.errors import LeangenError
from leangen.pipeline.finding import find, shipped

if TYPE_CHECKING:
    from leangen.engine import Engine
    from leangen.pipeline.atoms import Runner
    from leangen.pipeline.running import Pipeline, PipelineResult, PipelineStream
    from leangen.pipeline.spec import Spec, read

__all__ = [
    "Pipeline",
    "PipelineResult",
    "PipelineStream",
    "Spec",
    "find",
    "load",
    "read",
    "shipped",
]

_HOMES = {
    "Pipeline": "leangen.pipeline.running",
    "PipelineResult": "leangen.pipeline.running",
    "PipelineStream": "leangen.pipeline.running",
    "Spec": "leangen.pipeline.spec",
    "read": "leangen.pipeline.spec",
}


def __getattr__(name: str) -> Any:
    # On use: `leangen.load` only asks whether a name is a pipeline's, and mostly it is a model's.
    if name in _HOMES:
        return getattr(import_module(_HOMES[name]), name)
    raise AttributeError(f"module 'leangen.pipeline' has no attribute {name!r}")


def load(path: Path, open_model: Callable[[str], Engine]) -> Pipeline:
    """The pipeline in a file, its models opened by `open_model`, one part after the other.

    Raises RequestError for a file that is not right and for parts that do not fit, and what
    `open_model` raises, with the part's name before it.
    """
    from leangen.pipeline.atoms import Atom
    from leangen.pipeline.retrieval import Retriever
    from leangen.pipeline.running import Pipeline
    from leangen.pipeline.spec import read

    spec = read(path)
    atoms: dict[str, Runner] = {}
    engines: dict[str, Engine] = {}  # parts that are of one model share it
    for part in spec.parts:
        try:
            if part.model not in engines:
                engines[part.model] = open_model(part.model)
        except LeangenError as error:
            raise type(error)(f"{spec.name}: parts.{part.name}: {error}") from error
        engine = engines[part.model]
        engine.tag = engine.tag or spec.name
        atoms[part.name] = Retriever(engine) if part.retrieve else Atom(engine)
    return Pipeline(spec, atoms)
