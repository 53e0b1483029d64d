"""The numeric probe of a bundle: a fixed input of each graph, and what the reference makes of it.

It is one file of the bundle, written when a model is exported or quantized:

    GRAPH/in/NAME     an input of a run that the family's own calibration request made
    GRAPH/out/NAME    values of the fp32 model's outputs, on ONNX Runtime's own kernels
    GRAPH/error       what this bundle's outputs were off then (relative RMS): its scheme's own loss

`check` runs the graphs as a user would and finds those that are further off than that. It finds
what hashes cannot: a kernel, a lowering or an ONNX Runtime that computes something else.
"""

from __future__ import annotations

import io
import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import numpy as np

from leangen import families
from leangen.bundle import Bundle, add_file
from leangen.calibrate import Recorder, relative_error
from leangen.errors import BundleError
from leangen.session import Activations, Session

FILE = "probe.npz"
DECODERS = {
    "language": "model",
    "seq2seq/text": "decoder",
    "seq2seq/transcription": "decoder",
    "autoregressive/image": "model",
}
"""Graphs that run with their caches bound, by `Decoder`: they are asked for logits."""
TOKENS = 12
"""Of the prompt there."""
MOST_VALUES = 1 << 16
"""Of an output that are kept."""
SLACK = {"fp32": 1e-3, "fp16": 0.01, "bf16": 0.03}
LOW_BIT_SLACK = 0.04
"""How much further off than at export a graph may be: other kernels add up in another order, and
low-bit ones round activations at other places."""
GROWTH = 1.5
"""And by this factor of its own loss."""
MEMORY_SHARE = 0.5
"""A model larger than this share of the machine's memory is exported without a probe."""

Array = np.ndarray[Any, Any]
Runs = Mapping[str, tuple[Mapping[str, Array], Mapping[str, Array]]]
"""By graph: one run's inputs and outputs."""


@dataclass(frozen=True, slots=True)
class Deviation:
    """How far a graph is from its reference, and how far it may be."""

    role: str
    error: float
    """Relative RMS of its outputs."""
    limit: float
    at_export: float

    @property
    def passed(self) -> bool:
        """Whether it is near enough; NaN is not."""
        return self.error <= self.limit


def attach(bundle: Bundle, base: Bundle | None = None) -> Bundle:
    """The bundle with a probe in it; as it was where this machine cannot run it.

    The reference is that of `base`, the fp32 bundle that this one was quantized from (without a
    probe there is none here); else the bundle itself, with fp32 activations. A bundle that came
    with a probe keeps it.
    """
    if FILE in bundle.files or bundle.size_bytes > MEMORY_SHARE * _memory_bytes():
        return bundle
    if base is not None and FILE not in base.files:
        return bundle
    try:
        runs = _record(bundle) if base is None else _read(base)[0]
        exact = bundle.scheme == "fp32"
        errors = dict.fromkeys(runs, 0.0) if exact else _errors(_plain(bundle), runs)
    except BundleError:  # an export must not fail for what the machine cannot run
        return bundle
    if not runs:
        return bundle
    return add_file(bundle, FILE, content(runs, errors))


def inputs(bundle: Bundle, rows: int) -> dict[str, dict[str, Array]]:
    """By graph, `rows` rows of what the family's first requests for calibration feed it."""
    return {
        role: {name: array[:rows] for name, array in named.items()}
        for role, named in _feeds(bundle).items()
    }


def content(runs: Runs, errors: Mapping[str, float]) -> bytes:
    """The file that holds runs and how far off the bundle was, by graph; outputs are thinned."""
    runs = {
        role: (feeds, {name: _thinned(value) for name, value in outputs.items()})
        for role, (feeds, outputs) in runs.items()
    }
    arrays = {
        f"{role}/{side}/{name}": array
        for role, sides in runs.items()
        for side, named in zip(("in", "out"), sides, strict=True)
        for name, array in named.items()
    }
    arrays |= {f"{role}/error": np.array(error) for role, error in errors.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast(dict[str, Any], arrays))
    return buffer.getvalue()


def check(session: Session) -> list[Deviation]:
    """How far each graph is from its reference, computed as `session` does; [] with no probe."""
    bundle = session.bundle
    if FILE not in bundle.files:
        return []
    runs, at_export = _read(bundle)
    slack = SLACK.get(bundle.scheme, LOW_BIT_SLACK)
    return [
        Deviation(role, error, GROWTH * at_export[role] + slack, at_export[role])
        for role, error in _errors(session, runs).items()
    ]


def _read(bundle: Bundle) -> tuple[Runs, dict[str, float]]:
    runs: dict[str, tuple[dict[str, Array], dict[str, Array]]] = {}
    errors: dict[str, float] = {}
    try:
        with np.load(bundle.asset(FILE), allow_pickle=False) as file:
            for key in file.files:
                role, side, *name = key.split("/", 2)
                if side == "error":
                    errors[role] = float(file[key])
                else:
                    runs.setdefault(role, ({}, {}))[side == "out"][name[0]] = file[key]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise BundleError(
            f"bundle {bundle.path}: {FILE} is damaged ({error}): pull or export the model again"
        ) from error
    return runs, errors


def _record(bundle: Bundle) -> Runs:
    """One run of each graph that a request of the family makes, computed with fp32 activations."""
    decoder = DECODERS.get(families.key(bundle))
    feeds = {} if list(bundle.graphs) == [decoder] else _feeds(bundle)
    if decoder is not None:
        count = min(TOKENS, bundle.config.get("context_length", TOKENS))
        tokens = np.arange(1, count + 1) * 7919 % bundle.config["vocab_size"]
        feeds[decoder] = {"tokens": tokens}
    outputs = _computed(_plain(bundle, activations="fp32"), feeds)
    return {role: (feeds[role], outputs[role]) for role in outputs}


def _feeds(bundle: Bundle) -> dict[str, Mapping[str, Array]]:
    """What the graphs are fed by the family's first requests for calibration, or its example.

    The first one that feeds all is the last: most families need one, a density flow two.
    """
    family = families.of(bundle)
    recorder = Recorder(bundle)
    requests = getattr(family, "calibration_requests", None)
    asked = [family.Request(**family.EXAMPLE)] if requests is None else requests(recorder)
    for request in asked:
        steps = family.run(recorder, request)
        for step in steps:
            if families.key(bundle) in DECODERS and step.units == 0:
                steps.close()  # an encoder has run; what follows is computed from its outputs
        if families.key(bundle) in DECODERS or all(recorder.feeds(1).values()):
            break
    return {role: feeds[-1] for role, feeds in recorder.feeds(1).items() if feeds}


def _plain(bundle: Bundle, activations: Activations = "int8") -> Session:
    """On ONNX Runtime's own kernels, so that a reference does not depend on leangen's."""
    return Session(bundle, kernels="ort", activations=activations)


def _errors(session: Session, runs: Runs) -> dict[str, float]:
    found = {}
    computed = _computed(session, {role: feeds for role, (feeds, _) in runs.items()})
    for role, (_, reference) in runs.items():
        outputs = computed[role]
        if outputs.keys() != reference.keys():
            raise BundleError(
                f"bundle {session.bundle.path}: graph {role!r} gives {', '.join(outputs)}, its "
                f"probe expects {', '.join(reference)}: pull or export the model again"
            )
        values = [outputs[name] for name in reference]
        found[role] = math.sqrt(relative_error(values, list(reference.values())))
    return found


def _computed(
    session: Session, feeds: Mapping[str, Mapping[str, Array]]
) -> dict[str, dict[str, Array]]:
    """The outputs of each graph, thinned to `MOST_VALUES` evenly spaced ones."""
    made: dict[str, dict[str, Array]] = {}
    decoder = DECODERS.get(families.key(session.bundle))
    for role, named in feeds.items():
        if role == decoder:
            made[role] = {"logits": _logits(session, role, named["tokens"], made.get("encoder"))}
        else:
            names = [value.name for value in session.graph(role).get_outputs()]
            made[role] = dict(zip(names, session.run(role, named, names), strict=True))
    return {
        role: {name: _thinned(value) for name, value in named.items()}
        for role, named in made.items()
    }


def _thinned(value: Array) -> Array:
    return value.reshape(-1)[:: -(-value.size // MOST_VALUES) or 1]


def _logits(
    session: Session, role: str, tokens: Array, beside: Mapping[str, Array] | None
) -> Array:
    """Logits [vocab] after a prompt, by the path that generation takes."""
    from leangen.families.decoder import Decoder

    with Decoder(session, len(tokens), role=role, beside=beside) as decoder:
        return decoder.feed(tokens.tolist()).copy()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
