"""`leangen.load`: from a name to a model that generates."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Concatenate, ParamSpec

from leangen import carbon, devices, pipeline
from leangen.budget import Budget, Guard
from leangen.console import Progress, say
from leangen.engine import BASELINE_S, Engine
from leangen.ledger import Ledger
from leangen.session import Activations, Kernels, KeysValues, Session
from leangen.store import Store

P = ParamSpec("P")


def _or_pipeline(
    load_model: Callable[Concatenate[str | Path, P], Engine],
) -> Callable[Concatenate[str | Path, P], Engine | pipeline.Pipeline]:
    """`load_model` that also takes a pipeline, and loads its models the same way."""

    @wraps(load_model)
    def load(ref: str | Path, /, *args: P.args, **options: P.kwargs) -> Engine | pipeline.Pipeline:
        path = pipeline.find(ref)
        if path is None:
            return load_model(ref, *args, **options)
        return pipeline.load(path, lambda model: load_model(model, *args, **options))

    return load


def load_model(
    ref: str | Path,
    *,
    threads: int | None = None,
    activations: Activations = "int8",
    kernels: Kernels = "auto",
    device: str = "cpu",
    kv: KeysValues | None = None,
    home: str | Path | None = None,
    ledger: bool = True,
    region: str | None = None,
    intensity: float | str | Path | None = None,
    embodied: tuple[float, float] | None = None,
    tag: str | None = None,
    budget: Budget | Sequence[Budget] = (),
    baseline_s: float = BASELINE_S,
    meter: str | None = None,
    progress: Progress | None = None,
) -> Engine:
    """Load a model by `NAME`, `NAME:SCHEME` or a bundle's path; fetched and quantized on first use.

    threads: intra-op threads; None chooses by affinity, cgroup and SMT, and says why.
    activations: "fp32" computes low-bit layers without rounding activations (slower).
    kernels: "ort" keeps to ONNX Runtime's own, for comparison; else leangen's run where they fit.
    kv: how a language model's keys and values are kept, fp32, fp16 or int8; None is as its scheme
        says, else fp16, where leangen's kernels run it (ONNX Runtime's keep fp32).
    device: `cpu`, `cuda`, `cuda:N` (an NVIDIA card) or `auto`: a card where all it takes is there.
    home: the store; None is `$LEANGEN_HOME` or the platform's cache folder.
    ledger: keep the receipt of every generation in the store's ledger.
    region: whose grid the carbon figure assumes; None is `$LEANGEN_REGION` or the world's mean.
    intensity: your own gCO2e/kWh, or a CSV file of it over time; goes before the region's.
    embodied: kgCO2e of making the hardware and the years of its use; with it receipts carry SCI.
    budget: limits on top of those that the store keeps (`leangen budget`).
    baseline_s: how long idle power is measured, once, where a counter can tell.
    meter: what measures, in place of the rule in `leangen.meters`: `exec:COMMAND`, `file:PATH`, or
        a name that `leangen meters` shows.
    progress: called with (done, total, what) while something is fetched or quantized.

    Raises a LeangenError that says what was given, what was expected and what to do.

        import leangen as lg
        m = lg.load("smollm2-135m:int4")
        r = m.generate("The capital of France is", max_new_tokens=8)
        print(r.text, r.receipt.energy.gross_j, r.receipt.energy.u_j)

    `leangen.load` also takes a pipeline, by its TOML file or a shipped one's name: see
    `leangen.pipeline`.
    """
    devices.choose(device)  # what is missing there is said before anything is fetched
    footprint = carbon.footprint(region, intensity=intensity, embodied=embodied)
    store = Store(None if home is None else Path(home))
    bundle = store.resolve(str(ref), notify=say, progress=progress)
    session = Session(
        bundle, threads=threads, activations=activations, kernels=kernels, kv=kv, device=device
    )
    if len(bundle.graphs) == 1:  # of several some may never be needed
        session.open_ahead(*bundle.graphs)
    book = Ledger(store.ledger_path)
    budgets = (budget,) if isinstance(budget, Budget) else tuple(budget)
    return Engine(
        session,
        ledger=book if ledger else None,
        footprint=footprint,
        tag=tag,
        guard=Guard(store.home, book, budgets),
        baseline_s=baseline_s,
        meter=meter,
        probes=store.home / "probes.json",
    )


load = _or_pipeline(load_model)
