"""The numeric probe of a bundle: a fixed input of each graph, and what the reference makes of it.

It is one file of the bundle, written when a model is exported or quantized:

    GRAPH/in/NAME     an input of one recorded run of the family's own calibration request
    GRAPH/out/NAME    the outputs of the fp32 model, on ONNX Runtime's own kernels
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
TOKENS = 12
"""Of a language model's prompt."""
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
    probe there is none here); else the bundle itself, with fp32 activations.
    """
    if bundle.size_bytes > MEMORY_SHARE * _memory_bytes():
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
    arrays = {
        f"{role}/{side}/{name}": array
        for role, sides in runs.items()
        for side, named in zip(("in", "out"), sides, strict=True)
        for name, array in named.items()
    }
    arrays |= {f"{role}/error": np.array(error) for role, error in errors.items()}
    buffer = io.BytesIO()
    np.savez_compressed(buffer, **cast(dict[str, Any], arrays))
    return add_file(bundle, FILE, buffer.getvalue())


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
    """One run of each graph that the family's first calibration request makes."""
    if bundle.family == "language":
        session = _plain(bundle, activations="fp32")
        tokens = np.arange(1, TOKENS + 1) * 7919 % bundle.config["vocab_size"]
        return {"model": ({"tokens": tokens}, {"logits": _logits(session, tokens)})}
    family = families.of(bundle)
    requests = getattr(family, "calibration_requests", None)
    if requests is None:
        return {}
    recorder = Recorder(bundle)
    for _ in family.run(recorder, requests(recorder)[0]):
        pass
    session = _plain(bundle, activations="fp32")
    return {
        role: (feeds[-1], _outputs(session, role, feeds[-1]))
        for role, feeds in recorder.feeds(1).items()
        if feeds
    }


def _plain(bundle: Bundle, activations: Activations = "int8") -> Session:
    """On ONNX Runtime's own kernels, so that a reference does not depend on leangen's."""
    return Session(bundle, kernels="ort", activations=activations)


def _errors(session: Session, runs: Runs) -> dict[str, float]:
    found = {}
    for role, (feeds, reference) in runs.items():
        if session.bundle.family == "language":
            outputs = {"logits": _logits(session, feeds["tokens"])}
        else:
            outputs = _outputs(session, role, feeds)
        if outputs.keys() != reference.keys():
            raise BundleError(
                f"bundle {session.bundle.path}: graph {role!r} gives {', '.join(outputs)}, its "
                f"probe expects {', '.join(reference)}: pull or export the model again"
            )
        values = [outputs[name] for name in reference]
        found[role] = math.sqrt(relative_error(values, list(reference.values())))
    return found


def _outputs(session: Session, role: str, feeds: Mapping[str, Array]) -> dict[str, Array]:
    names = [value.name for value in session.graph(role).get_outputs()]
    return dict(zip(names, session.run(role, feeds, names), strict=True))


def _logits(session: Session, tokens: Array) -> Array:
    """Logits [vocab] after the prompt, by the path that generation takes."""
    from leangen.families.decoder import Decoder

    with Decoder(session, len(tokens)) as decoder:
        return decoder.feed(tokens.tolist()).copy()


def _memory_bytes() -> int:
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
