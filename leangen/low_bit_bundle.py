"""Writes a quantized bundle: graphs with their stand-ins, and a manifest that accounts for all."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from typing import Any

from leangen import calibrate, family_recipes, probe
from leangen.bundle import Bundle, create, open_bundle
from leangen.calibrate import Feeds
from leangen.console import Progress
from leangen.errors import UnknownSchemeError
from leangen.graph_edit import Graph
from leangen.plan import Choice
from leangen.sites import Site
from leangen.treatments import Treatments, code_bits

Note = Callable[[str], None]
Inputs = tuple[Mapping[str, Sequence[Feeds]], list[Any]]
"""Calibration feeds by graph role, and the requests or data that they came of."""


@dataclass(frozen=True, slots=True)
class Planned:
    """One graph with a choice for each of its nodes."""

    graph: Graph
    sites: Sequence[Site]
    """The nodes to treat; `choices` also has those that stay fp32."""
    treatments: Treatments
    choices: dict[str, Choice]
    parameters: Mapping[str, int]
    """Float parameters of the original graph: name and size."""


@dataclass(slots=True)
class _Result:
    """One graph, quantized."""

    nodes: dict[str, dict[str, Any]]
    stored_bits: int
    low_weights: int
    """Weights at 8 bits or fewer."""
    weights: int
    relative_rmse: float | None = None

    @property
    def treated(self) -> bool:
        """Whether any node took a low precision."""
        return any(entry["treatment"] != "fp32" for entry in self.nodes.values())


def write(
    bundle: Bundle,
    scheme: str,
    gather: Callable[[], Inputs],
    plan: Callable[[str, Sequence[Feeds], Note], Planned],
    out: Path,
    *,
    method: str | None = None,
    config: Mapping[str, Any] | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write the fp32 `bundle` to folder `out`, each graph as `plan` (role, feeds, note) has it.

    gather: makes the feeds. method: how linear layers are rounded, for the manifest. config: what
    differs from the fp32 bundle's. Raises BundleError for parameters that are no numbers,
    UnknownSchemeError for a bundle that is quantized already
    and where nothing is treated, StorageError when `out` exists (unless `replace`) or the disk is
    full.
    """
    if bundle.scheme != "fp32":
        raise UnknownSchemeError(
            f"bundle {bundle.path} is {bundle.scheme} already, expected fp32: "
            f"quantize the fp32 bundle of {bundle.name} instead"
        )
    for role in bundle.graphs:
        Graph(bundle.graph(role)).check_numbers()
    report = progress or (lambda done, total, what: None)
    total = len(bundle.graphs) + 1
    report(0, total, "calibrating")
    feeds, requests = gather()
    with create(out, replace=replace) as draft:
        planned = {}
        for done, role in enumerate(bundle.graphs, start=1):
            planned[role] = plan(role, feeds[role], partial(_note, report, done, total, role))
        _agree(planned.values())
        results = {}
        for role, name in bundle.graphs.items():
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            note = partial(_note, report, len(bundle.graphs), total, role)
            results[role] = _write(planned[role], target, note)
            if family_recipes.of(bundle).measured:
                results[role].relative_rmse = _rmse(bundle, role, target, feeds[role])
        copy_assets(bundle, draft.folder)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, scheme
        draft.graphs, draft.config = dict(bundle.graphs), {**bundle.config, **(config or {})}
        draft.source = dict(bundle.source)
        draft.quantization = _describe(scheme, method, results, requests)
        if not any(result.treated for result in results.values()):
            raise UnknownSchemeError(
                f"{scheme} fits no weight of bundle {bundle.path}: use it as it is, in fp32"
            )
    report(total, total, "done")
    return probe.attach(open_bundle(out), base=bundle)


def _note(report: Progress, done: int, total: int, role: str, what: str) -> None:
    report(done, total, f"{role}: {what}")


def _agree(planned: Collection[Planned]) -> None:
    """Give a node that several graphs have (a flow, forward and back) its most exact treatment."""
    best: dict[str, Choice] = {}
    for part in planned:
        for name, choice in part.choices.items():
            if name not in best or code_bits(choice.treatment) > code_bits(best[name].treatment):
                best[name] = choice
    for part in planned:
        for name in part.choices:
            part.choices[name] = best[name]


def _write(part: Planned, target: Path, note: Note) -> _Result:
    """Write the quantized graph and account for what it stores."""
    treated = {}
    for done, site in enumerate(part.sites, start=1):
        if (treatment := part.choices[site.node.name].treatment) != "fp32":
            note(f"rounding, {done} of {len(part.sites)} layers")
            treated[site.node.name] = part.treatments.apply(site, treatment)
    part.graph.replace({name: stand_in.nodes for name, stand_in in treated.items()})
    part.graph.save(target)
    of_weight = {
        site.weight: treated[site.node.name] for site in part.sites if site.node.name in treated
    }
    size_of = {site.node.name: site.weights for site in part.sites}
    nodes: dict[str, dict[str, Any]] = {}
    for name, choice in part.choices.items():
        bits = treated[name].stored_bits / size_of[name] if name in treated else 32.0
        nodes[name] = {
            "treatment": choice.treatment,
            "bits": round(bits, 3),
            "reason": choice.reason,
        }
    return _Result(
        nodes=nodes,
        stored_bits=sum(
            of_weight[name].stored_bits if name in of_weight else 32 * size
            for name, size in part.parameters.items()
        ),
        low_weights=sum(
            size
            for name, size in part.parameters.items()
            if name in of_weight and of_weight[name].code_bits <= 8
        ),
        weights=sum(part.parameters.values()),
    )


def _rmse(bundle: Bundle, role: str, target: Path, feeds: Sequence[Feeds]) -> float | None:
    """Relative RMSE of the quantized graph's outputs on the calibration feeds."""
    if not feeds:
        return None
    exact = calibrate.open_session(bundle.graph(role))
    small = calibrate.open_session(target)
    errors = [
        calibrate.relative_error(small.run(None, dict(feed)), exact.run(None, dict(feed)))
        for feed in feeds
    ]
    return sqrt(sum(errors) / len(errors))


def _describe(
    scheme: str, method: str | None, results: Mapping[str, _Result], requests: Sequence[Any]
) -> dict[str, Any]:
    weights = max(1, sum(result.weights for result in results.values()))
    several = len(results) > 1
    return {
        "scheme": scheme,
        **({} if method is None else {"method": method}),
        "bits_per_weight": sum(result.stored_bits for result in results.values()) / weights,
        "weights_8bit_or_fewer": sum(r.low_weights for r in results.values()) / weights,
        "nodes": {
            f"{role}:{name}" if several else name: entry
            for role, result in results.items()
            for name, entry in result.nodes.items()
        },
        "calibration": {
            "requests": list(requests),
            "relative_rmse": {
                role: result.relative_rmse
                for role, result in results.items()
                if result.relative_rmse is not None
            },
        },
    }


def copy_assets(bundle: Bundle, folder: Path) -> None:
    """Every file but the graphs, their weights and the probe: tokenizer, phoneme map ..."""
    left = {probe.FILE, *bundle.graphs.values()} | {
        str((Path(name).parent / location).as_posix())
        for role, name in bundle.graphs.items()
        for location in Graph(bundle.graph(role)).external_files()
    }
    for name in bundle.files:
        if name not in left:
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
