"""Makes a low-precision bundle of an fp32 one: a treatment for each node, with its reason.

Linear layers and embeddings take their treatment from the recipe. Convolutional graphs are planned
from measurements: what each node's treatment alone does to the graph's output (`sensitivity`), on
inputs that the model itself makes (`calibrate`). The manifest keeps every choice and figure.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from leangen import calibrate, plan, schemes
from leangen.bundle import Bundle, create, open_bundle
from leangen.calibrate import Feeds
from leangen.errors import UnknownSchemeError
from leangen.graph_edit import Graph
from leangen.plan import Choice
from leangen.treatments import Site, Treated, Treatments, find_sites

Progress = Callable[[int, int, str], None]
"""Called with (done, total, what) as the work goes on."""

KEEP_FP32 = {
    "flow": {
        "/dp/*": "the duration predictor sets how long each sound lasts: an error moves all after",
    }
}
"""By family: patterns of node names that stay fp32, with the reason."""


@dataclass(frozen=True, slots=True)
class _Result:
    """One graph, quantized."""

    nodes: dict[str, dict[str, Any]]
    stored_bits: int
    low_weights: int
    """Weights at 8 bits or fewer."""
    weights: int
    relative_rmse: float | None


def quantize(
    bundle: Bundle,
    scheme: str,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write `bundle` in `scheme` (`int8` or `int4`) to folder `out` and open it.

    The result is deterministic. Raises UnknownSchemeError for an unknown scheme, for a bundle that
    is quantized already and for one without weights to quantize; StorageError when `out` exists
    (unless `replace`) or the disk is full.
    """
    schemes.get(scheme)
    if bundle.scheme != "fp32":
        raise UnknownSchemeError(
            f"bundle {bundle.path} is {bundle.scheme} already, expected fp32: "
            f"quantize the fp32 bundle of {bundle.name} instead"
        )
    report = progress or (lambda done, total, what: None)
    total = len(bundle.graphs) + 1
    report(0, total, "calibrating")
    feeds, requests = _calibrate(bundle)
    with create(out, replace=replace) as draft:
        results = {}
        for done, (role, name) in enumerate(bundle.graphs.items(), start=1):
            report(done, total, f"quantizing {role}")
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            results[role] = _quantize_graph(bundle, role, scheme, feeds[role], target)
        _copy_assets(bundle, draft.folder)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, scheme
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
        draft.source = dict(bundle.source)
        draft.quantization = _describe(scheme, results, requests)
        if not draft.quantization["weights_8bit_or_fewer"]:
            raise UnknownSchemeError(
                f"{scheme} fits no weight of bundle {bundle.path}: use it as it is, in fp32"
            )
    report(total, total, "done")
    return open_bundle(out)


def _calibrate(bundle: Bundle) -> tuple[dict[str, list[Feeds]], list[Any]]:
    """Feeds for the graphs that are planned from measurements; none where no graph is."""
    measured = any(_is_measured(find_sites(Graph(bundle.graph(role)))) for role in bundle.graphs)
    if measured:
        return calibrate.record(bundle)
    return {role: [] for role in bundle.graphs}, []


def _is_measured(sites: Sequence[Site]) -> bool:
    return any(site.kind in ("conv", "deconv") for site in sites)


def _quantize_graph(
    bundle: Bundle, role: str, scheme: str, feeds: Sequence[Feeds], target: Path
) -> _Result:
    graph = Graph(bundle.graph(role))
    parameters = graph.float_parameters()
    kept = KEEP_FP32.get(bundle.family, {})
    choices: dict[str, Choice] = {}
    sites = []
    for site in find_sites(graph):
        reason = next((why for glob, why in kept.items() if fnmatch(site.node.name, glob)), None)
        if reason is not None:
            choices[site.node.name] = Choice("fp32", reason)
        else:
            sites.append(site)
    if _is_measured(sites) and feeds:
        weights = {site.weight for site in find_sites(graph)}
        untouched = sum(size for name, size in parameters.items() if name not in weights)
        treatments, chosen = plan.measured(graph, sites, feeds, scheme, untouched=untouched)
    else:
        treatments = Treatments(graph)
        chosen = plan.uniform(graph, sites, treatments, scheme)
    choices |= chosen
    treated = {
        site.node.name: treatments.apply(site, choices[site.node.name].treatment)
        for site in sites
        if choices[site.node.name].treatment != "fp32"
    }
    graph.replace({name: stand_in.nodes for name, stand_in in treated.items()})
    graph.save(target)
    return _account(sites, choices, treated, parameters, _rmse(bundle, role, target, feeds))


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
    return float(sum(errors) / len(errors)) ** 0.5


def _account(
    sites: Sequence[Site],
    choices: Mapping[str, Choice],
    treated: Mapping[str, Treated],
    parameters: Mapping[str, int],
    relative_rmse: float | None,
) -> _Result:
    """What is stored for the graph's float parameters, and each node's entry for the manifest."""
    packed = {
        site.weight: treated[site.node.name].packed for site in sites if site.node.name in treated
    }
    stored = sum(
        packed[name].stored_bits if name in packed else size * 32
        for name, size in parameters.items()
    )
    nodes: dict[str, dict[str, Any]] = {}
    for name, choice in choices.items():
        bits = treated[name].packed.bits_per_weight if name in treated else 32.0
        nodes[name] = {"treatment": choice.treatment, "bits": round(bits, 3)}
        nodes[name]["reason"] = choice.reason
    return _Result(
        nodes=nodes,
        stored_bits=stored,
        low_weights=sum(size for name, size in parameters.items() if name in packed),
        weights=sum(parameters.values()),
        relative_rmse=relative_rmse,
    )


def _describe(
    scheme: str, results: Mapping[str, _Result], requests: Sequence[Any]
) -> dict[str, Any]:
    weights = max(1, sum(result.weights for result in results.values()))
    several = len(results) > 1
    return {
        "scheme": scheme,
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


def _copy_assets(bundle: Bundle, folder: Path) -> None:
    """Every file but the graphs and their weights: tokenizer, phoneme map ..."""
    weights = {
        str((Path(name).parent / location).as_posix())
        for role, name in bundle.graphs.items()
        for location in Graph(bundle.graph(role)).external_files()
    }
    for name in bundle.files:
        if name not in weights and name not in bundle.graphs.values():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(bundle.path / name, folder / name)
