"""Makes a low-precision bundle of an fp32 one: a treatment for each node, with its reason.

Linear layers and embeddings take their treatment from the recipe. Convolutional graphs are planned
from measurements: what each node's treatment alone does to the graph's output (`sensitivity`), on
inputs that the model itself makes (`calibrate`). The manifest keeps every choice and figure.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType

from leangen import (
    calibration_data,
    family_recipes,
    low_bit_bundle,
    methods,
    plan,
    plan_measured,
    recorded,
    rotation,
)
from leangen.bundle import Bundle, check_place, sha256_file
from leangen.calibrate import Feeds
from leangen.console import Progress
from leangen.errors import LeangenError, RequestError, UnknownSchemeError
from leangen.graph_edit import Graph, Range
from leangen.low_bit_bundle import Inputs, Note, Planned
from leangen.moments import Moments
from leangen.plan import Choice
from leangen.precision import HALVES, Precision, parse
from leangen.recipe import SCHEME, NodeRecipe
from leangen.rounding import Folder, Kept, Rounder, method_of, trial
from leangen.schemes import Packed
from leangen.sites import Site, find_sites
from leangen.treatments import Treatments


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
    Layers that a method took time over are kept beside `out` until all is done: if this is killed,
    the next call with the same arguments goes on from there.

    Raises UnknownSchemeError for an unknown scheme, for a bundle that is quantized already and for
    one without weights to quantize; RequestError for data that does not fit; StorageError when
    `out` exists (unless `replace`) or the disk is full.
    """
    precision = parse(scheme)
    check_place(out, replace=replace)  # before the work, not after it
    if precision.kv and ("kv_heads" not in bundle.config or "io" in bundle.config):
        raise UnknownSchemeError(
            f"{bundle.name} ({bundle.family}) keeps no keys and values in leangen's own form: "
            "leave out -kvN"
        )
    known = recorded.plan(bundle, precision) if data is None else None
    method = method_of(precision, family_recipes.of(bundle).method)
    kept = Folder.beside(out, f"{bundle.digest} {precision} {_identity(data)}")
    if precision.rotated and bundle.scheme == "fp32":
        with rotation.rotated(bundle, out) as turned:
            return _write(turned, precision, method, data, known, kept, out, replace, progress)
    return _write(bundle, precision, method, data, known, kept, out, replace, progress)


def _write(
    bundle: Bundle,
    precision: Precision,
    method: ModuleType,
    data: Path | None,
    known: Mapping[str, str] | None,
    kept: Folder,
    out: Path,
    replace: bool,
    progress: Progress | None,
) -> Bundle:

    def planned(role: str, feeds: Sequence[Feeds], note: Note) -> Planned:
        return _plan(bundle, role, precision, method, feeds, known, kept, note)

    try:
        made = low_bit_bundle.write(
            bundle,
            str(precision),
            partial(_feeds, bundle, precision, method, data),
            planned,
            out,
            method=methods.name(method) if precision.scheme in methods.SCHEMES else None,
            config={"kv": precision.kv} if precision.kv else None,
            replace=replace,
            progress=progress,
        )
    except LeangenError:
        kept.discard()
        raise
    kept.discard()
    return made


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
    check_place(out, replace=replace)
    known = {node.name for role in bundle.graphs for node in Graph(bundle.graph(role)).nodes}
    if strange := [node for node in recipe.nodes if node not in known]:
        raise RequestError(
            f"the model has no node {strange[0]!r}, which the recipe names: tune the model again"
        )
    if recipe.method not in methods.METHODS:
        raise RequestError(
            f"the recipe rounds by {recipe.method!r}, expected {', '.join(methods.METHODS)}: "
            "tune the model again"
        )

    known_inputs = calibration or Calibration(bundle, recipe.method)

    def planned(role: str, feeds: Sequence[Feeds], note: Note) -> Planned:
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
        return Planned(graph, sites, treatments, choices, parameters)

    def gather() -> Inputs:
        return known_inputs.feeds, known_inputs.requests

    return low_bit_bundle.write(
        bundle,
        SCHEME,
        gather,
        planned,
        out,
        method=recipe.method,
        config=recipe.config(),
        replace=replace,
        progress=progress,
    )


class Calibration:
    """What calibration runs of a bundle gave, kept so that it can be quantized again and again.

    method: how linear layers of few bits are rounded; what was rounded is kept as well.
    """

    def __init__(self, bundle: Bundle, method: str = "rtn") -> None:
        self.method = method
        self._method = methods.get(method)
        self._measured = family_recipes.of(bundle).measured
        self.feeds, self.requests = _no_feeds(bundle)
        if self._measured or self._method.NEEDS_DATA:
            self.feeds, self.requests = calibration_data.feeds(bundle, None)
        self._bundle = bundle
        self._spans: dict[str, Mapping[str, Range]] = {}
        self._rounded: dict[str, Packed] = {}

    def spans(self, role: str) -> Mapping[str, Range]:
        """The ranges of a graph's tensors around its convolutions and linear layers."""
        if role not in self._spans:
            graph, sites = _treatable(self._bundle, role)
            feeds = self.feeds[role] if self._measured else []
            self._spans[role] = plan.spans(graph, sites, feeds)
        return self._spans[role]

    def prepared(self, role: str) -> tuple[Graph, list[Site], Treatments]:
        """A graph, the nodes that may be treated, and their treatments."""
        graph, sites = _treatable(self._bundle, role)
        feeds = self.feeds[role]
        moments = _moments(self._bundle, role, sites, feeds) if feeds else None
        rounding = Rounder(self._method, moments, self._rounded)
        return graph, sites, Treatments(graph, self.spans(role), rounding)


def weights_only(bundle: Bundle, node: str) -> str | None:
    """Why the family's recipe keeps a node's activations fp32, or None."""
    return family_recipes.of(bundle).weights_only(node)


def _treatable(bundle: Bundle, role: str) -> tuple[Graph, list[Site]]:
    graph, kept = Graph(bundle.graph(role)), family_recipes.of(bundle).kept
    return graph, [site for site in find_sites(graph) if kept(site.node.name) is None]


def _fits(treatments: Treatments, site: Site, treatment: str) -> bool:
    try:
        return treatments.fits(site, treatment)
    except ValueError:  # no treatment at all
        return False


def _identity(data: Path | None) -> str:
    """What tells calibration data from other data."""
    if data is None or not data.exists():
        return ""
    if data.is_file():
        return sha256_file(data)
    held = sorted((path.name, path.stat().st_size) for path in data.iterdir())
    return hashlib.sha256(repr(held).encode()).hexdigest()


def _feeds(bundle: Bundle, precision: Precision, method: ModuleType, data: Path | None) -> Inputs:
    """Calibration feeds by graph role, where something needs them, and what they are."""
    measured = family_recipes.of(bundle).measured and precision.scheme not in HALVES
    if measured or method.NEEDS_DATA:
        feeds, said = calibration_data.feeds(bundle, data)
        if method.NEEDS_DATA and not any(feeds.values()):
            raise RequestError(
                f"{precision} calibrates on data, and {bundle.name} makes none itself: give --data "
                "(a .npz with one run of a graph), or leave out --method"
            )
        return feeds, said
    if data is not None:
        raise RequestError(
            f"{precision} of {bundle.name} looks at no data: leave out --data, or add a method "
            "such as --method gptq"
        )
    return _no_feeds(bundle)


def _no_feeds(bundle: Bundle) -> tuple[dict[str, list[Feeds]], list[object]]:
    return {role: [] for role in bundle.graphs}, []


def _moments(
    bundle: Bundle,
    role: str,
    sites: Sequence[Site],
    feeds: Sequence[Feeds],
    note: Note = lambda what: None,
) -> Moments:
    linear = {site.node.input[0]: site.columns for site in sites if site.kind == "linear"}
    return Moments(bundle.graph(role), linear, feeds, note=note)


def _plan(
    bundle: Bundle,
    role: str,
    precision: Precision,
    method: ModuleType,
    feeds: Sequence[Feeds],
    known: Mapping[str, str] | None,
    kept: Kept,
    note: Note,
) -> Planned:
    recipe = family_recipes.of(bundle)
    graph = Graph(bundle.graph(role))
    parameters = graph.float_parameters()
    found = find_sites(graph)
    reasons = {site.node.name: recipe.kept(site.node.name) for site in found}
    sites = [site for site in found if reasons[site.node.name] is None]
    moments = _moments(bundle, role, sites, feeds, note) if feeds else None
    if moments is not None and hasattr(method, "prepare"):
        method.prepare(graph, sites, moments, partial(trial, precision))
    rounding = Rounder(method, moments, kept)
    if known is not None:
        note(f"{len(sites)} layers by a recorded plan")
        several = len(bundle.graphs) > 1
        mine = {n: known[f"{role}:{n}" if several else n] for n in (s.node.name for s in sites)}
        treatments, choices = plan.recorded(graph, sites, feeds, mine, rounding)
    elif recipe.measured and feeds and sites and precision.scheme not in HALVES:
        untouched = sum(parameters.values()) - sum(
            parameters[weight] for weight in {site.weight for site in found}
        )
        treatments, choices = plan_measured.measured(
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
    for name, reason in reasons.items():
        if reason is not None:
            choices[name] = Choice("fp32", reason)
    return Planned(graph, sites, treatments, choices, parameters)
