"""Makes ONNX Runtime sessions for a bundle's graphs: provider, threads, kernels; says why."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Literal, TypeVar, cast

import numpy as np
import onnxruntime as ort

from leangen import devices, lowering
from leangen import threads as thread_choice
from leangen.bundle import Bundle
from leangen.errors import BundleError, DependencyError, OutOfMemoryError, RequestError

Activations = Literal["int8", "fp32"]
Kernels = Literal["auto", "ort"]
KeysValues = Literal["fp32", "fp16", "int8"]
T = TypeVar("T")

# ORT's default lets idle threads spin for about a millisecond after every node; between requests
# that burns a core, 16 ms of CPU a request here. 200 us bridge what lies between two tokens; they
# cost about 1 ms.
SPIN_US = 200


class Session:
    """The open graphs of one bundle, and what a family keeps beside them.

    `activations="fp32"` computes low-bit linear layers with fp32 activations: slower, for checks
    that must not see activation rounding. `kernels="ort"` keeps to ONNX Runtime's own. `kv` is how
    a language model's keys and values are kept: as the bundle says, else in fp16, where leangen's
    kernels run it. `device` is `cpu`, `cuda`, `cuda:N` or `auto`, see `leangen.devices`. Graphs
    open on first use; `kernels`, `kv` and their reasons then say what runs.
    """

    def __init__(
        self,
        bundle: Bundle,
        *,
        threads: int | None = None,
        activations: Activations = "int8",
        kernels: Kernels = "auto",
        kv: KeysValues | None = None,
        device: str = "cpu",
    ) -> None:
        most = thread_choice.MOST
        if threads is not None and not (isinstance(threads, int) and 1 <= threads <= most):
            raise RequestError(f"threads is {threads!r}, expected a whole number, 1 to {most}")
        if activations not in ("int8", "fp32"):
            raise RequestError(f"activations is {activations!r}, expected 'int8' or 'fp32'")
        if kernels not in ("auto", "ort"):
            raise RequestError(f"kernels is {kernels!r}, expected 'auto' or 'ort'")
        if kv not in (None, *lowering.KV_FORMS):
            raise RequestError(f"kv is {kv!r}, expected {', '.join(lowering.KV_FORMS)}")
        if kv is not None and "kv_heads" not in bundle.config:
            raise RequestError(
                f"{bundle.name} ({bundle.family}) keeps no keys and values: leave out --kv"
            )
        self.bundle = bundle
        self._kv, self._kv_reason = _keys_values(bundle, kv, activations)
        tuned = bundle.config.get("run", {})
        self.threads, why = thread_choice.choose(threads)
        if threads is None and "threads" in tuned:
            self.threads, why = min(tuned["threads"], self.threads), "what `leangen tune` found"
        self._spin_us = int(tuned.get("spin_us", SPIN_US))
        self.device = devices.choose(device)
        self.provider = self.device.provider
        self.kernels = "ort"
        self.activations: Activations = activations
        self.reasons: dict[str, str] = {
            "threads": why,
            "provider": self.device.reason,
            "kernels": "ONNX Runtime's own were asked for",
        }
        if activations == "fp32":
            self.reasons["activations"] = "fp32 asked for: low-bit layers do not round activations"
        self._lower = kernels == "auto"
        self._kernel_reasons: dict[str, str] = {}
        self._graphs: dict[str, ort.InferenceSession] = {}
        self._opening: dict[str, threading.Thread] = {}
        self._kept: dict[str, Any] = {}

    def graph(self, role: str) -> ort.InferenceSession:
        """The ORT session of a graph role such as `model`, opened on first use.

        The first use of a bundle on this machine lowers it, once. Raises BundleError when ORT
        cannot load it.
        """
        if (thread := self._opening.get(role)) is not None:
            thread.join()  # whoever asks waits
            self._opening.pop(role, None)
        if role not in self._graphs:
            self._open(role)
        return self._graphs[role]

    def open_ahead(self, role: str) -> None:
        """Begin to open a graph that `graph` will be asked for, in a thread of its own.

        ORT loads without Python's lock, so the caller can import and read other things meanwhile.
        What goes wrong is raised by `graph`, which tries again.
        """
        if role in self._graphs or role in self._opening:
            return
        if self._lower:
            self._find(role)  # lowering takes long, and Ctrl-C reaches only this thread

        def quietly() -> None:
            with suppress(Exception):
                self._open(role)

        thread = threading.Thread(target=quietly, name=f"leangen-open-{role}")
        with suppress(RuntimeError):  # there is no memory for a thread: `graph` does without
            thread.start()
            self._opening[role] = thread

    def _open(self, role: str) -> None:
        graph = self._open_lowered(role) or self._open_own(role)
        self._tell_kv(graph)
        self._graphs[role] = graph

    def _find(self, role: str) -> tuple[lowering.Lowered | None, str]:
        fp32 = self.activations == "fp32"
        return lowering.find(
            self.bundle, role, fp32_activations=fp32, kv=self._kv, device=self.device.kind
        )

    def _open_lowered(self, role: str) -> ort.InferenceSession | None:
        """The graph on leangen's kernels; None where ORT is to run it, and the reason says why."""
        if not self._lower:
            return None
        graph = None
        # One that does not open is damaged, or another version of leangen has just replaced it.
        for _ in range(2):
            lowered, why = self._find(role)
            if lowered is None:
                break
            options = self._options()
            options.register_custom_ops_library(str(lowered.library))
            try:
                graph = self._load(str(lowered.path), options, lowered.path)
            except BundleError as error:
                lowered.discard()
                why = f"ONNX Runtime's own: the lowered graph does not open ({error})"
            else:
                self.kernels = lowered.variant
                break
        self._kernel_reasons[role] = why
        told = dict.fromkeys(self._kernel_reasons.values())
        by_role = [f"{role}: {reason}" for role, reason in self._kernel_reasons.items()]
        self.reasons["kernels"] = "; ".join(by_role if len(told) > 1 else told)
        return graph

    def _tell_kv(self, graph: ort.InferenceSession) -> None:
        """Say how an open graph keeps keys and values, if it does."""
        kinds = (entry.type for entry in graph.get_inputs() if entry.name.startswith("past_key"))
        kind = next(kinds, None)
        if kind is None:
            return
        kept = {"tensor(float16)": "fp16", "tensor(int8)": "int8"}.get(kind, "fp32")
        self.reasons["kv"] = f"{kept}: {self._kv_reason}"
        if kept != self._kv:
            whose = "ONNX Runtime's attention runs" if kept == "fp32" else "a card's kernels run"
            self.reasons["kv"] = f"{kept}: {whose}, which keeps no {self._kv} ({self._kv_reason})"

    def _open_own(self, role: str) -> ort.InferenceSession:
        path, options = self.bundle.graph(role), self._options()
        model: str | bytes = str(path)
        if self.activations == "fp32":
            model = _with_fp32_activations(path, options)
        return self._load(model, options, path)

    def _load(
        self, model: str | bytes, options: ort.SessionOptions, path: Path
    ) -> ort.InferenceSession:
        try:
            with self.card_told():
                graph = ort.InferenceSession(
                    model, options, providers=self.device.providers(), **devices.ALONE
                )
        except OutOfMemoryError:
            raise
        except Exception as error:  # ORT raises many unrelated types from its C++ side
            detail = str(error).splitlines()[0]
            raise BundleError(f"ONNX Runtime cannot load {path}: {detail}") from error
        if self.provider not in graph.get_providers():  # ORT only logs that it went without
            raise DependencyError(
                f"--device {self.device.name}: ONNX Runtime's CUDA provider does not start for "
                f"{path}; its log says why"
            )
        if self.device.kind == "cpu":
            return graph
        return cast(ort.InferenceSession, devices.OnCard(graph, self.card_told))

    @contextmanager
    def card_told(self) -> Iterator[None]:
        """Around what takes a card's memory: OutOfMemoryError when there is none left.

        It says what there is, what was asked for and what needs less.
        """
        try:
            yield
        except Exception as error:  # ORT raises many unrelated types from its C++ side
            if self.device.kind == "cpu" or not devices.out_of_memory(str(error)):
                raise
            bits = float(self.bundle.quantization.get("bits_per_weight", 32))
            load = devices.Load(self.bundle.name, self.bundle.size_bytes, bits)
            raise OutOfMemoryError(load.too_much(self.device, str(error))) from error

    def _options(self) -> ort.SessionOptions:
        options = ort.SessionOptions()
        options.intra_op_num_threads = self.threads
        options.inter_op_num_threads = 1
        options.log_severity_level = 3
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(self._spin_us))
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


def _keys_values(
    bundle: Bundle, asked: KeysValues | None, activations: Activations
) -> tuple[str, str]:
    """How keys and values are to be kept, and why."""
    if asked is not None:
        return asked, "asked for"
    stated = bundle.config.get("kv")
    if stated in lowering.KV_FORMS:
        return str(stated), f"the bundle's scheme, {bundle.scheme}"
    if activations == "fp32":
        return "fp32", "as activations are"
    return "fp16", "rounding to 11 bits does not show beside that of activations to 8"


def _with_fp32_activations(path: Path, options: ort.SessionOptions) -> bytes:
    """The bundle's own graph, its low-bit linear layers with fp32 activations."""
    import onnx

    from leangen.lowering import activations

    model = onnx.load(path, load_external_data=False)
    activations.use_fp32(model)
    options.add_session_config_entry(
        "session.model_external_initializers_file_folder_path", str(path.parent)
    )
    return bytes(model.SerializeToString())
