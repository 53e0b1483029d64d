"""Makes a low-precision bundle of an fp32 one: a treatment for each node, with its reason.

Linear layers and embeddings take their treatment from the recipe. Convolutional graphs are planned
from measurements: what each node's treatment alone does to the graph's output (`sensitivity`), on
inputs that the model itself makes (`calibrate`). The manifest keeps every choice and figure.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import sqrt
from pathlib import Path
from types import ModuleType
from typing import Any

from leangen import (
    calibrate,
    calibration_data,
    family_recipes,
    methods,
    plan,
    probe,
    recorded,
    schemes,
)
from leangen.bundle import Bundle, create, open_bundle
from leangen.calibrate import Feeds
from leangen.console import Progress
from leangen.errors import RequestError, UnknownSchemeError
from leangen.graph_edit import Array, Graph, Range
from leangen.moments import Moments
from leangen.plan import Choice
from leangen.precision import HALVES, Precision, parse
from leangen.recipe import SCHEME, NodeRecipe
from leangen.schemes import Packed
from leangen.sites import Site, find_sites
from leangen.treatments import Treatments, code_bits

Note = Callable[[str], None]
Inputs = tuple[dict[str, list[Feeds]], list[Any]]
"""Calibration feeds by graph role, and the requests or data that they came of."""


@dataclass(frozen=True, slots=True)
class _Planned:
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


def quantize(
    bundle: Bundle,
    scheme: str,
    out: Path,
    *,
    data: Path | None = None,
    replace: bool = False,
    progress: Progress | None = None,
) -> Bundle:
    """Write `bundle` in `scheme` (see `leangen.precision`) to folder `out` and open it.

    `data` is calibrated on where the recipe or the method needs any (`leangen.calibration_data`
    says what it may be); without it, on what the model makes itself. The result is deterministic.

    Raises UnknownSchemeError for an unknown scheme, for a bundle that is quantized already and for
    one without weights to quantize; RequestError for data that does not fit; StorageError when
    `out` exists (unless `replace`) or the disk is full.
    """
    precision = parse(scheme)
    known = recorded.plan(bundle, precision) if data is None else None

    def planned(role: str, feeds: Sequence[Feeds], note: Note) -> _Planned:
        return _plan(bundle, role, precision, feeds, known, note)

    gather = partial(_feeds, bundle, precision, data)
    return _make(bundle, str(precision), gather, planned, out, replace, progress)


def replay(
    bundle: Bundle,
    recipe: NodeRecipe,
    out: Path,
    *,
    replace: bool = False,
    progress: Progress | None = None,
    calibration: Calibration | None = None,
) -> Bundle:
    """Write `bundle` as `recipe` says, node by node; the same bits every time.

    calibration: of this bundle, where it is at hand already. Raises RequestError for a recipe of
    another model or with treatments that do not fit, and what `quantize` raises.
    """
    recipe.check(bundle)
    known = {node.name for role in bundle.graphs for node in Graph(bundle.graph(role)).nodes}
    if strange := [node for node in recipe.nodes if node not in known]:
        raise RequestError(
            f"the model has no node {strange[0]!r}, which the recipe names: tune the model again"
        )

    known_inputs = calibration or Calibration(bundle)

    def planned(role: str, feeds: Sequence[Feeds], note: Note) -> _Planned:
        note(f"{len(recipe.nodes)} layers by recipe")
        graph, sites, treatments = known_inputs.prepared(role)
        parameters = graph.float_parameters()
        choices = {}
        for site in sites:
            wanted = recipe.nodes.get(site.node.name, "fp32")
            if wanted != "fp32" and not _fits(treatments, site, wanted):
                raise RequestError(
                    f"the recipe gives {site.node.name!r} the treatment {wanted!r}, which does not "
                    "fit it: tune the model again"
                )
            choices[site.node.name] = Choice(wanted, "by recipe")
        return _Planned(graph, sites, treatments, choices, parameters)

    def gather() -> Inputs:
        return known_inputs.feeds, known_inputs.requests

    return _make(bundle, SCHEME, gather, planned, out, replace, progress)


class Calibration:
    """What calibration runs of a bundle gave, kept so that it can be quantized again and again."""

    def __init__(self, bundle: Bundle) -> None:
        self.feeds, self.requests = _no_feeds(bundle)
        if family_recipes.of(bundle).measured:
            self.feeds, self.requests = calibration_data.feeds(bundle, None)
        self._bundle = bundle
        self._spans: dict[str, Mapping[str, Range]] = {}

    def spans(self, role: str) -> Mapping[str, Range]:
        """The ranges of a graph's tensors around its convolutions and linear layers."""
        if role not in self._spans:
            graph, sites = _treatable(self._bundle, role)
            self._spans[role] = plan.spans(graph, sites, self.feeds[role])
        return self._spans[role]

    def prepared(self, role: str) -> tuple[Graph, list[Site], Treatments]:
        """A graph, the nodes that may be treated, and their treatments."""
        graph, sites = _treatable(self._bundle, role)
        return graph, sites, Treatments(graph, self.spans(role))


def _treatable(bundle: Bundle, role: str) -> tuple[Graph, list[Site]]:
    graph, kept = Graph(bundle.graph(role)), family_recipes.of(bundle).kept
    return graph, [site for site in find_sites(graph) if kept(site.node.name) is None]


def weights_only(bundle: Bundle, node: str) -> str | None:
    """Why the family's recipe keeps a node's activations fp32, or None."""
    return family_recipes.of(bundle).weights_only(node)


def _fits(treatments: Treatments, site: Site, treatment: str) -> bool:
    try:
        return treatments.fits(site, treatment)
    except ValueError:  # no treatment at all
        return False


def _make(
    bundle: Bundle,
    scheme: str,
    gather: Callable[[], Inputs],
    plan_of: Callable[[str, Sequence[Feeds], Note], _Planned],
    out: Path,
    replace: bool,
    progress: Progress | None,
) -> Bundle:
    """Write a bundle whose graphs `plan_of` (role, feeds, note) plans on what `gather` gives."""
    if bundle.scheme != "fp32":
        raise UnknownSchemeError(
            f"bundle {bundle.path} is {bundle.scheme} already, expected fp32: "
            f"quantize the fp32 bundle of {bundle.name} instead"
        )
    report = progress or (lambda done, total, what: None)
    total = len(bundle.graphs) + 1
    report(0, total, "calibrating")
    feeds, requests = gather()
    with create(out, replace=replace) as draft:
        planned = {}
        for done, role in enumerate(bundle.graphs, start=1):
            planned[role] = plan_of(role, feeds[role], partial(_note, report, done, total, role))
        _agree(planned.values())
        results = {}
        for role, name in bundle.graphs.items():
            target = draft.folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            results[role] = _write(planned[role], target)
            if family_recipes.of(bundle).measured:
                results[role].relative_rmse = _rmse(bundle, role, target, feeds[role])
        _copy_assets(bundle, draft.folder)
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, scheme
        draft.graphs, draft.config = dict(bundle.graphs), dict(bundle.config)
        draft.source = dict(bundle.source)
        draft.quantization = _describe(scheme, results, requests)
        if not any(result.treated for result in results.values()):
            raise UnknownSchemeError(
                f"{scheme} fits no weight of bundle {bundle.path}: use it as it is, in fp32"
            )
    report(total, total, "done")
    return probe.attach(open_bundle(out), base=bundle)


def _feeds(bundle: Bundle, precision: Precision, data: Path | None) -> Inputs:
    """Calibration feeds by graph role, where something needs them, and what they are."""
    measured = family_recipes.of(bundle).measured and precision.scheme not in HALVES
    if measured or methods.get(precision.method).NEEDS_DATA:
        return calibration_data.feeds(bundle, data)
    if data is not None:
        raise RequestError(
            f"{precision} of {bundle.name} looks at no data: leave out --data, or add a method "
            "such as --method gptq"
        )
    return _no_feeds(bundle)


def _no_feeds(bundle: Bundle) -> Inputs:
    return {role: [] for role in bundle.graphs}, []


def _note(report: Progress, done: int, total: int, role: str, what: str) -> None:
    report(done, total, f"{role}: {what}")


def _plan(
    bundle: Bundle,
    role: str,
    precision: Precision,
    feeds: Sequence[Feeds],
    known: Mapping[str, str] | None,
    note: Note,
) -> _Planned:
    recipe = family_recipes.of(bundle)
    graph = Graph(bundle.graph(role))
    parameters = graph.float_parameters()
    found = find_sites(graph)
    kept = {site.node.name: recipe.kept(site.node.name) for site in found}
    sites = [site for site in found if kept[site.node.name] is None]
    method = methods.get(precision.method)
    linear = {site.node.input[0]: site.columns for site in sites if site.kind == "linear"}
    moments = Moments(bundle.graph(role), linear, feeds, note=note)
    if method.NEEDS_DATA and feeds and hasattr(method, "prepare"):
        method.prepare(graph, sites, moments, partial(_trial, precision))
    rounding = partial(_round, method, moments if feeds else None)
    if known is not None:
        note(f"{len(sites)} layers by a recorded plan")
        several = len(bundle.graphs) > 1
        mine = {n: known[f"{role}:{n}" if several else n] for n in (s.node.name for s in sites)}
        treatments, choices = plan.recorded(graph, sites, feeds, mine)
    elif recipe.measured and feeds and sites and precision.scheme not in HALVES:
        untouched = sum(parameters.values()) - sum(
            parameters[weight] for weight in {site.weight for site in found}
        )
        treatments, choices = plan.measured(
            graph,
            sites,
            feeds,
            precision,
            rounding=rounding,
            untouched=untouched,
            activation_error=recipe.activation_error,
            caution=recipe.caution,
            weights_only=recipe.weights_only,
            note=note,
        )
    else:
        note(f"{len(sites)} layers")
        treatments = Treatments(graph, rounding=rounding)
        choices = plan.uniform(graph, sites, treatments, precision)
    for name, reason in kept.items():
        if reason is not None:
            choices[name] = Choice("fp32", reason)
    return _Planned(graph, sites, treatments, choices, parameters)


def _round(
    method: ModuleType,
    moments: Moments | None,
    site: Site,
    w: Array,
    scheme: ModuleType,
    options: Mapping[str, Any],
) -> Packed:
    """Codes of a linear layer: by the method where bits are few, else to the nearest."""
    packed: Packed
    if scheme.BITS > 4 or (method.NEEDS_DATA and moments is None):
        packed = scheme.quantize(w, **options)
    else:
        moment = moments[site.node.input[0]] if method.NEEDS_DATA and moments else None
        packed = method.quantize(w, scheme, moment, **options)
    return packed


def _trial(precision: Precision, site: Site, w: Array, importance: Array) -> Array:
    """A layer's weight as rounding would leave it, for methods that try."""
    scheme = schemes.get(precision.scheme)
    packed = scheme.quantize(
        w,
        block_size=precision.group or scheme.BLOCK,
        asymmetric=precision.asymmetric,
        importance=importance,
    )
    back: Array = scheme.dequantize(packed)
    return back


def _agree(planned: Collection[_Planned]) -> None:
    """Give a node that several graphs have (a flow, forward and back) its most exact treatment."""
    best: dict[str, Choice] = {}
    for part in planned:
        for name, choice in part.choices.items():
            if name not in best or code_bits(choice.treatment) > code_bits(best[name].treatment):
                best[name] = choice
    for part in planned:
        for name in part.choices:
            part.choices[name] = best[name]


def _write(part: _Planned, target: Path) -> _Result:
    """Write the quantized graph and account for what it stores."""
    treated = {
        site.node.name: part.treatments.apply(site, part.choices[site.node.name].treatment)
        for site in part.sites
        if part.choices[site.node.name].treatment != "fp32"
    }
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
