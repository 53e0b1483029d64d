"""Chooses a treatment for each node of a graph by what it does to the graph's outputs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from math import prod, sqrt

from leangen.calibrate import Feeds
from leangen.graph_edit import Graph, Range
from leangen.plan import Choice, spans
from leangen.precision import Precision
from leangen.sensitivity import Probe
from leangen.sites import Site
from leangen.treatments import Rounding, Treatments, code_bits

INT8_ERROR = 0.06
"""Relative RMSE of a graph's output that 8-bit weights may add; worse nodes get 16 bits."""
LOW_ERROR = 0.08
"""Relative RMSE of a graph's output that 4-bit weights (or 3, 2) may add; worse nodes get 8 ..."""
LOW_EXTRA_BITS = 0.95
"""... up to this many bits a parameter beyond the code's own, scales and fp32 included ..."""
LOW_WORST = 0.16
"""... unless that takes the error beyond this: then quality goes before size."""
_WORTH_STATIC = 0.9
"""Share of a graph's multiply-adds whose nodes are considered for int8 arithmetic; the rest is
too small for the cost of quantizing its inputs."""
# A group of nodes whose error is this share of the allowance is not looked into further.
_NEGLIGIBLE = 1 / 4


def measured(
    graph: Graph,
    sites: Sequence[Site],
    feeds: Sequence[Feeds],
    precision: Precision,
    *,
    rounding: Rounding,
    untouched: int,
    activation_error: float,
    caution: float,
    weights_only: Callable[[str], str | None],
    note: Callable[[str], None],
) -> tuple[Treatments, dict[str, Choice]]:
    """Treatments by what each does to the graph's outputs on `feeds`.

    `untouched` is the number of parameters too small to quantize: they weigh on the mean bits.
    `activation_error` is the relative RMSE of the graph's output that int8 arithmetic may add;
    allowances for the rounding of weights are divided by `caution`;
    `weights_only` says why a node is to have none, or None. `note` is told what goes on.
    """
    seen = spans(graph, sites, feeds)
    treatments = Treatments(graph, seen, rounding)
    by_name = {site.node.name: site for site in sites}
    work = {name: _multiply_adds(site, seen) for name, site in by_name.items()}
    choices = _eight_bits(sites, treatments)
    budget: float | None = None
    if precision.scheme == "int8":
        note(f"8-bit weights, {len(sites)} layers")
        _sixteen_bits(graph, sites, treatments, feeds, choices, caution)
    else:
        low = f"w{precision.code}"
        weights = sum(site.weights for site in sites)
        budget = (code_bits(low) + LOW_EXTRA_BITS) * (weights + untouched) - 32.0 * untouched
        note(f"{precision.scheme} weights, trying {len(sites)} layers")
        _low_bits(graph, sites, treatments, feeds, low, choices, budget, caution)
        budget -= _total_bits(by_name, treatments, choices)
    rounded: dict[str, Site] = {}
    for name, site in by_name.items():
        reason = weights_only(name)
        if precision.weights_only:
            continue
        if reason is None:
            rounded[name] = site
        else:
            choices[name] = Choice(choices[name].treatment, f"{choices[name].reason}; {reason}")
    if rounded:
        note(f"int8 arithmetic, trying {len(rounded)} layers")
        _static(graph, rounded, treatments, feeds, work, choices, budget, activation_error**2)
    return treatments, choices


def _eight_bits(sites: Sequence[Site], treatments: Treatments) -> dict[str, Choice]:
    choices = {}
    for site in sites:
        eight = next((t for t in ("w8", "gather8") if treatments.fits(site, t)), None)
        if eight is None:
            choices[site.node.name] = Choice("fp32", "no layout of ONNX Runtime fits its shape")
        else:
            choices[site.node.name] = Choice(eight, "8-bit weights, computed as fp32")
    return choices


def _sixteen_bits(
    graph: Graph,
    sites: Sequence[Site],
    treatments: Treatments,
    feeds: Sequence[Feeds],
    choices: dict[str, Choice],
    caution: float,
) -> None:
    """Turn the choices whose 8 bits harm the output most into 16 bits, where all together do."""
    small = {
        site.node.name: treatments.apply(site, "w8")
        for site in sites
        if choices[site.node.name].treatment == "w8"
    }
    probe = Probe(graph, small, feeds)
    allowed = (INT8_ERROR / caution) ** 2
    if probe.error(small) <= allowed:
        return
    harm = probe.harm(list(small), allowed * _NEGLIGIBLE)
    weights = {site.node.name: site.weights for site in sites}
    order = sorted(small, key=lambda name: harm[name] / weights[name])
    for name in order[_most_within(order, allowed, probe.error) :]:
        choices[name] = Choice(
            "w16", f"8 bits alone would change the output by {sqrt(harm[name]):.1e} (relative RMSE)"
        )


def _low_bits(
    graph: Graph,
    sites: Sequence[Site],
    treatments: Treatments,
    feeds: Sequence[Feeds],
    low: str,
    choices: dict[str, Choice],
    budget: float,
    caution: float,
) -> None:
    """Turn choices into the treatment `low`, but for nodes that harm the output most per bit saved.

    As many as keep to LOW_ERROR, and on to LOW_WORST until all is within `budget` bits.
    """
    small = {
        site.node.name: treatments.apply(site, low) for site in sites if treatments.fits(site, low)
    }
    probe = Probe(graph, small, feeds)
    allowed, worst = (LOW_ERROR / caution) ** 2, (LOW_WORST / caution) ** 2
    harm = probe.harm(list(small), allowed * _NEGLIGIBLE)
    by_name = {site.node.name: site for site in sites}
    order = sorted(small, key=lambda name: harm[name] / by_name[name].weights)
    bits = _total_bits(by_name, treatments, choices)
    needed = 0
    while needed < len(order) and bits > budget:
        site = by_name[order[needed]]
        bits -= treatments.stored_bits(site, choices[order[needed]].treatment)
        bits += treatments.stored_bits(site, low)
        needed += 1
    found = probe.error(order[:needed])
    if found <= allowed:
        count = _most_within(order, allowed, probe.error, fits=needed)
    elif found <= worst:
        count = needed
    else:
        count = _most_within(order[: needed - 1], worst, probe.error)
    for rank, name in enumerate(order):
        error = f"{sqrt(harm[name]):.1e} (relative RMSE)"
        if rank < count:
            choices[name] = Choice(low, f"{code_bits(low)} bits alone change the output by {error}")
        else:
            choices[name] = Choice(
                choices[name].treatment,
                f"{code_bits(low)} bits alone would change the output by {error}",
            )


def _static(
    graph: Graph,
    sites: Mapping[str, Site],
    treatments: Treatments,
    feeds: Sequence[Feeds],
    work: Mapping[str, int],
    choices: dict[str, Choice],
    budget: float | None,
    allowed: float,
) -> None:
    """Turn the layers with most work into int8 arithmetic, as far as the output bears it.

    `budget` bounds the bits that this may add to 4-bit choices; None for no bound.
    """
    int8_form = {"conv": "w8a8", "linear": "matmul8"}
    offered = {
        name: int8_form[site.kind]
        for name, site in sites.items()
        if site.kind in int8_form and treatments.fits(site, int8_form[site.kind])
    }
    heavy: list[str] = []
    total = sum(work[name] for name in offered)
    for name in sorted(offered, key=lambda name: -work[name] / sites[name].weights):
        now = treatments.stored_bits(sites[name], choices[name].treatment)
        extra = 8 * sites[name].weights - now
        if sum(work[kept] for kept in heavy) >= _WORTH_STATIC * total:
            break
        if budget is not None:
            if extra > budget:
                continue
            budget -= max(extra, 0)
        heavy.append(name)
    heavy = [name for name in offered if name in heavy]  # graph order: neighbours group well
    if not heavy:
        return
    stand_ins = {name: treatments.apply(sites[name], offered[name]) for name in heavy}
    probe = Probe(graph, stand_ins, feeds)
    harm = probe.harm(heavy, allowed * _NEGLIGIBLE)
    order = sorted(heavy, key=lambda name: harm[name] / work[name])
    chosen = order[: _most_within(order, allowed, probe.error)]
    for name in heavy:
        error, share = sqrt(harm[name]), work[name] / total
        if name in chosen:
            choices[name] = Choice(
                offered[name],
                f"{share:.1%} of the work; int8 arithmetic alone changes the output by {error:.1e}",
            )
        else:
            choices[name] = Choice(
                choices[name].treatment,
                f"{choices[name].reason}; int8 arithmetic would change the output by {error:.1e}",
            )


def _most_within(
    order: Sequence[str], allowed: float, error: Callable[[Sequence[str]], float], fits: int = 0
) -> int:
    """How many of the first nodes can be treated together with an error of at most `allowed`.

    At least `fits`. Errors of single nodes add up only roughly: they gave the order, and no more.
    """
    fails = len(order) + 1
    while fails - fits > 1:
        count = (fits + fails) // 2
        if error(order[:count]) <= allowed:
            fits = count
        else:
            fails = count
    return fits


def _multiply_adds(site: Site, spans: Mapping[str, Range]) -> int:
    span = spans.get(site.node.output[0]) if site.node.output else None
    return prod(span.shape) * site.columns if span is not None else 0


def _total_bits(
    sites: Mapping[str, Site], treatments: Treatments, choices: Mapping[str, Choice]
) -> float:
    return sum(
        treatments.stored_bits(site, choices[name].treatment) for name, site in sites.items()
    )
