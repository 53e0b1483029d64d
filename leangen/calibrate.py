"""Runs a bundle to collect what quantization needs: feeds of its graphs, ranges of tensors."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import onnxruntime as ort
from onnx import TensorProto, helper

from leangen import families, threads
from leangen.bundle import Bundle
from leangen.errors import BundleError
from leangen.graph_edit import Array, Graph, Range
from leangen.session import SPIN_US, Session

Feeds = Mapping[str, Array]
T = TypeVar("T")


class Recorder(Session):
    """A session that keeps a copy of what every graph is fed."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, kernels="ort")  # what is recorded must not depend on the machine
        self._seen: dict[str, list[Feeds]] = {role: [] for role in bundle.graphs}

    def run(
        self, role: str, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> list[Array]:
        self._seen[role].append({name: np.array(value) for name, value in feeds.items()})
        return super().run(role, feeds, outputs)

    def feeds(self, limit: int) -> dict[str, list[Feeds]]:
        """Up to `limit` runs of each graph, spread evenly from the first to the last.

        A sampler's steps differ in noise level: these see early and late ones.
        """
        return {role: evenly(seen, limit) for role, seen in self._seen.items()}


def evenly(items: Sequence[T], limit: int) -> list[T]:
    """Up to `limit` of the items, evenly from the first to the last."""
    count = min(limit, len(items))
    return [items[round(i)] for i in np.linspace(0, len(items) - 1, count)]


def record(
    bundle: Bundle, asked: Sequence[Any] | None = None, *, limit: int = 4
) -> tuple[dict[str, list[Feeds]], list[Any]]:
    """Carry out requests, by default the family's own for calibration: feeds per role, requests.

    At most `limit` runs of each graph are kept; both are empty for a family whose module has no
    `calibration_requests`.
    """
    family = families.of(bundle)
    requests: Callable[[Session], Iterable[Any]] | None = getattr(
        family, "calibration_requests", None
    )
    recorder = Recorder(bundle)
    if asked is None:
        asked = [] if requests is None else list(requests(Session(bundle)))
    for request in asked:
        for _ in family.run(recorder, request):
            pass
    return recorder.feeds(limit), [dict(request.describe()) for request in asked]


def ranges(graph: Graph, tensors: Iterable[str], feeds: Iterable[Feeds]) -> dict[str, Range]:
    """The range of each tensor over all feeds, and its largest shape.

    Reduced inside the graph, so that no activation outlives its use.
    """
    names = list(dict.fromkeys(tensors))
    if not names:
        return {}
    model = graph.proto()
    for index, name in enumerate(names):
        for op, kind in (
            ("ReduceMin", TensorProto.FLOAT),
            ("ReduceMax", TensorProto.FLOAT),
            ("Shape", TensorProto.INT64),
        ):
            output = f"calibrate/{index}/{op}"
            options: dict[str, Any] = {} if op == "Shape" else {"keepdims": 0}
            model.graph.node.append(helper.make_node(op, [name], [output], output, **options))
            model.graph.output.append(helper.make_tensor_value_info(output, kind, None))
    wanted = [output.name for output in model.graph.output][-3 * len(names) :]
    found: dict[str, Range] = {}
    with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
        path = Path(folder) / "ranges.onnx"
        graph.save(path, model)
        session = open_session(path)
        for feed in feeds:
            values = session.run(wanted, dict(feed))
            for name, low, high, shape in zip(
                names, values[0::3], values[1::3], values[2::3], strict=True
            ):
                if not (np.isfinite(low) and np.isfinite(high)):
                    raise BundleError(
                        f"tensor {name!r} of {graph.folder} became {low} to {high} while "
                        "calibrating: export the model again, or use another scheme"
                    )
                old = found.get(name, Range(float(low), float(high), tuple(shape)))
                found[name] = Range(
                    min(old.low, float(low)),
                    max(old.high, float(high)),
                    max(old.shape, tuple(int(size) for size in shape), key=np.prod),
                )
    return found


def open_session(path: Path, library: Path | None = None) -> ort.InferenceSession:
    """An ORT session for calibration: CPU, all cores that are ours, no warnings.

    library: of custom operators that the graph has.
    """
    options = ort.SessionOptions()
    if library is not None:
        options.register_custom_ops_library(str(library))
    options.intra_op_num_threads, _ = threads.choose(None)
    options.log_severity_level = 3
    options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def relative_error(outputs: Sequence[Array], reference: Sequence[Array]) -> float:
    """Squared relative error of a run, averaged over its float outputs.

    An output whose shape changed counts as wholly wrong (1).
    """
    errors = []
    for value, wanted in zip(outputs, reference, strict=True):
        if wanted.dtype.kind != "f" or wanted.size == 0:
            continue
        if value.shape != wanted.shape:
            errors.append(1.0)
            continue
        exact = wanted.astype(np.float64)
        energy = float((exact**2).sum())
        errors.append(float(((value - exact) ** 2).sum()) / energy if energy else 0.0)
    return float(np.mean(errors)) if errors else 0.0
