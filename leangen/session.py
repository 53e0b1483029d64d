"""Makes ONNX Runtime sessions for a bundle's graphs: provider, threads, spinning; says why."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import onnxruntime as ort

from leangen import threads as thread_choice
from leangen.bundle import Bundle
from leangen.errors import BundleError, RequestError

Activations = Literal["int8", "fp32"]
T = TypeVar("T")

# ORT's default lets idle threads spin for about a millisecond after every node; between requests
# that burns a core. 20 us still catches the next node inside a generation.
SPIN_US = 20


class Session:
    """The open graphs of one bundle, and what a family keeps beside them.

    `activations="fp32"` computes low-bit linear layers with fp32 activations: slower, for checks
    that must not see activation rounding. Graphs open on first use.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        activations: Activations = "int8",
    ) -> None:
        if threads is not None and threads < 1:
            raise RequestError(f"threads is {threads}, expected 1 or more")
        if activations not in ("int8", "fp32"):
            raise RequestError(f"activations is {activations!r}, expected 'int8' or 'fp32'")
        self.bundle = bundle
        self.threads, why = thread_choice.choose(threads)
        self.provider = "CPUExecutionProvider"
        self.kernels = "ort"
        self.activations: Activations = activations
        self.reasons: dict[str, str] = {
            "threads": why,
            "provider": "the only provider this leangen runs on",
            "kernels": "ONNX Runtime's own kernels; leangen has none of its own yet",
        }
        if activations == "fp32":
            self.reasons["activations"] = "fp32 asked for: low-bit layers do not round activations"
        self._graphs: dict[str, ort.InferenceSession] = {}
        self._kept: dict[str, Any] = {}

    def graph(self, role: str) -> ort.InferenceSession:
        """The ORT session of a graph role such as `model`, opened on first use.

        Raises BundleError when ORT cannot load it.
        """
        if role not in self._graphs:
            path = self.bundle.graph(role)
            options = self._options()
            try:
                model: str | bytes = str(path)
                if self.activations == "fp32":
                    model = _with_fp32_activations(path, options)
                self._graphs[role] = ort.InferenceSession(model, options, providers=[self.provider])
            except Exception as error:  # ORT raises many unrelated types from its C++ side
                detail = str(error).splitlines()[0]
                raise BundleError(f"ONNX Runtime cannot load {path}: {detail}") from error
        return self._graphs[role]

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_US))
        return options

    def run(
        self, role: str, feeds: Mapping[str, Any], outputs: Sequence[str] | None = None
    ) -> list[np.ndarray[Any, Any]]:
        """Run one graph on NumPy arrays; outputs in the order asked for (all when None)."""
        return cast(list[np.ndarray[Any, Any]], self.graph(role).run(outputs, dict(feeds)))

    def keep(self, key: str, build: Callable[[], T]) -> T:
        """What a family builds once per session: a tokenizer, a chat template, noise tables."""
        if key not in self._kept:
            self._kept[key] = build()
        return cast(T, self._kept[key])


def _with_fp32_activations(path: Path, options: ort.SessionOptions) -> bytes:
    """The graph with every MatMulNBits at accuracy level 1: activations stay fp32.

    ORT's own switch, `mlas.qnbit.force_fp32`, reaches 4-bit weights in blocks of 32 only.
    """
    import onnx

    model = onnx.load(path, load_external_data=False)
    for node in model.graph.node:
        for attribute in node.attribute:
            if node.op_type == "MatMulNBits" and attribute.name == "accuracy_level":
                attribute.i = 1
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return bytes(model.SerializeToString())
