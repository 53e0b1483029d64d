"""Chooses a treatment for each node of a graph: by rule, or from measured sensitivities."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod, sqrt

from leangen import calibrate
from leangen.calibrate import Feeds
from leangen.graph_edit import Graph, Range
from leangen.sensitivity import Probe
from leangen.sites import Site
from leangen.treatments import BLOCK, Treatments

INT8_ERROR = 0.06
"""Relative RMSE of a graph's output that 8-bit weights may add; worse nodes get 16 bits."""
INT4_ERROR = 0.08
"""Relative RMSE of a graph's output that 4-bit weights may add; worse nodes get 8 bits ..."""
INT4_BITS = 4.95
"""... up to this many bits a parameter on average, scales and what stays fp32 included ..."""
INT4_WORST = 0.16
"""... unless that takes the error beyond this: then quality goes before size."""
_WORTH_STATIC = 0.9
"""Share of a graph's multiply-adds whose nodes are considered for int8 arithmetic; the rest is
too small for the cost of quantizing its inputs."""
# A group of nodes whose error is this share of the allowance is not looked into further.
_NEGLIGIBLE = 1 / 4


@dataclass(frozen=True, slots=True)
class Choice:
    """A node's treatment and why it got that one."""

    treatment: str
    reason: str


def uniform(
    graph: Graph, sites: Sequence[Site], treatments: Treatments, scheme: str
) -> dict[str, Choice]:
    """The same treatment for all layers of a kind, but for those next to the output.

    The output head keeps 8 bits, and in int8 the last block's MLP keeps fp32 activations: on
    SmolLM2-135M that takes top-1 agreement with fp32 from 96.4 to 96.8% (4,096 tokens).
    """
    last_mlp = f"/layers.{_last_block(sites)}/mlp/"
    shared = {site.weight for site in sites if site.kind == "embedding"}
    outputs = {output.name for output in graph.model.graph.output}
    choices = {}
    for site in sites:
        offered = treatments.offered(site)
        if not offered:
            choices[site.node.name] = Choice("fp32", "no layout of ONNX Runtime fits its shape")
        elif site.kind == "embedding":
            choices[site.node.name] = Choice("gather8", "embedding: rows are looked up, 8 bits")
        elif scheme == "int4" and (site.weight in shared or outputs & set(site.node.output)):
            choices[site.node.name] = Choice(
                offered[-1], "output head: its errors go straight into the result"
            )
        elif scheme == "int8" and site.node.name.startswith(last_mlp):
            choices[site.node.name] = Choice(
                "w8", "last MLP: the rounding of its activations meets the logits raw"
            )
        else:
            bits = scheme[-1]
            first = next(t for t in (f"matmul{bits}", "w4", "w8") if t in offered and t[-1] >= bits)
            choices[site.node.name] = Choice(first, f"{site.kind} layer of an {scheme} bundle")
    return choices


def _last_block(sites: Sequence[Site]) -> int:
    blocks = (re.match(r"/layers\.(\d+)/", site.node.name) for site in sites)
    return max((int(block[1]) for block in blocks if block), default=-1)


def measured(
    graph: Graph,
    sites: Sequence[Site],
    feeds: Sequence[Feeds],
    scheme: str,
    *,
    untouched: int,
    activation_error: float,
    weights_only: Callable[[str], str | None],
    note: Callable[[str], None],
) -> tuple[Treatments, dict[str, Choice]]:
    """Treatments by what each does to the graph's outputs on `feeds`.

    `untouched` is the number of parameters too small to quantize: they weigh on int4's mean bits.
    `activation_error` is the relative RMSE of the graph's output that int8 arithmetic may add;
    `weights_only` says why a node is to have none, or None. `note` is told what goes on.
    """
    around = [
        name
        for site in sites
        if site.kind in ("conv", "linear")
        for name in (site.node.input[0], site.node.output[0])
    ]
    spans = calibrate.ranges(graph, around, feeds)
    treatments = Treatments(graph, spans)
    by_name = {site.node.name: site for site in sites}
    work = {name: _multiply_adds(site, spans) for name, site in by_name.items()}
    choices = _eight_bits(sites, treatments)
    budget: float | None = None
    if scheme == "int8":
        note(f"8-bit weights, {len(sites)} layers")
        _sixteen_bits(graph, sites, treatments, feeds, choices)
    else:
        weights = sum(site.weights for site in sites)
        budget = INT4_BITS * (weights + untouched) - 32.0 * untouched
        note(f"4-bit weights, trying {len(sites)} layers")
        _four_bits(graph, sites, treatments, feeds, choices, budget)
        budget -= _total_bits(by_name, choices)
    rounded: dict[str, Site] = {}
    for name, site in by_name.items():
        reason = weights_only(name)
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
        offered = treatments.offered(site)
        eight = next((t for t in ("w8", "gather8") if t in offered), None)
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
) -> None:
    """Turn the choices whose 8 bits harm the output most into 16 bits, where all together do."""
    small = {
        site.node.name: treatments.apply(site, "w8")
        for site in sites
        if choices[site.node.name].treatment == "w8"
    }
    probe = Probe(graph, small, feeds)
    allowed = INT8_ERROR**2
    if probe.error(small) <= allowed:
        return
    harm = probe.harm(list(small), allowed * _NEGLIGIBLE)
    weights = {site.node.name: site.weights for site in sites}
    order = sorted(small, key=lambda name: harm[name] / weights[name])
    for name in order[_most_within(order, allowed, probe.error) :]:
        choices[name] = Choice(
            "w16", f"8 bits alone would change the output by {sqrt(harm[name]):.1e} (relative RMSE)"
        )


def _four_bits(
    graph: Graph,
    sites: Sequence[Site],
    treatments: Treatments,
    feeds: Sequence[Feeds],
    choices: dict[str, Choice],
    budget: float,
) -> None:
    """Turn choices into 4 bits, but for the nodes that harm the output most per bit saved.

    As many as keep to INT4_ERROR, and on to INT4_WORST until all is within `budget` bits.
    """
    small = {}
    for site in sites:
        four = next((t for t in treatments.offered(site) if t == "w4"), None)
        if four is not None:
            small[site.node.name] = treatments.apply(site, four)
    probe = Probe(graph, small, feeds)
    allowed = INT4_ERROR**2
    harm = probe.harm(list(small), allowed * _NEGLIGIBLE)
    by_name = {site.node.name: site for site in sites}
    order = sorted(small, key=lambda name: harm[name] / by_name[name].weights)
    good = _most_within(order, allowed, probe.error)
    bearable = _most_within(order, INT4_WORST**2, probe.error)
    for rank, name in enumerate(order):
        error = f"{sqrt(harm[name]):.1e} (relative RMSE)"
        if rank < good or (rank < bearable and _total_bits(by_name, choices) > budget):
            choices[name] = Choice("w4", f"4 bits alone change the output by {error}")
        else:
            choices[name] = Choice(
                choices[name].treatment, f"4 bits alone would change the output by {error}"
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
        if int8_form.get(site.kind) in treatments.offered(site)
    }
    heavy: list[str] = []
    total = sum(work[name] for name in offered)
    for name in sorted(offered, key=lambda name: -work[name] / sites[name].weights):
        extra = 8 * sites[name].weights - _stored_bits(sites[name], choices[name].treatment)
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
    order: Sequence[str], allowed: float, error: Callable[[Sequence[str]], float]
) -> int:
    """How many of the first nodes can be treated together with an error of at most `allowed`.

    Errors of single nodes add up only roughly: they gave the order, and no more.
    """
    fits, fails = 0, len(order) + 1
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


def _total_bits(sites: Mapping[str, Site], choices: Mapping[str, Choice]) -> float:
    return sum(_stored_bits(site, choices[name].treatment) for name, site in sites.items())


def _stored_bits(site: Site, treatment: str) -> float:
    match treatment:
        case "fp32":
            return 32.0 * site.weights
        case "w16":
            return 16.0 * site.weights
        case "w4":
            return site.weights * (4 + 16 / BLOCK)
        case "matmul4":
            return site.weights * (4 + 32 / BLOCK)
        case "matmul8" | "gather8":
            return site.weights * (8 + 32 / BLOCK)
        case "w8" if site.columns % BLOCK == 0:
            return site.weights * (8 + 16 / BLOCK)
        case _:
            return site.weights * 8.0 + site.rows * 32
