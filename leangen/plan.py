"""Chooses a treatment for each node of a graph by rule; `plan_measured` has the other way."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from leangen import calibrate
from leangen.calibrate import Feeds
from leangen.graph_edit import Graph, Range
from leangen.precision import HALVES, Precision
from leangen.sites import Site
from leangen.treatments import Rounding, Treatments

HEAD = "/lm_head"
"""What an exporter calls a language model's output head, and what it puts before it."""


@dataclass(frozen=True, slots=True)
class Choice:
    """A node's treatment and why it got that one."""

    treatment: str
    reason: str


def uniform(
    graph: Graph, sites: Sequence[Site], treatments: Treatments, precision: Precision
) -> dict[str, Choice]:
    """The same treatment for all layers of a kind, but for those next to the output.

    The output head keeps 8 bits, and in int8 the last block's MLP keeps fp32 activations: on
    SmolLM2-135M that takes top-1 agreement with fp32 from 96.4 to 96.8% (4,096 tokens).
    """
    last_mlp = f"/layers.{_last_block(sites)}/mlp/"
    shared = {site.weight for site in sites if site.kind == "embedding"}
    outputs = {output.name for output in graph.model.graph.output}
    only = "-wo" if precision.weights_only else ""
    low, eight = f"matmul{precision.code}{only}", f"matmul8{only}"
    choices = {}
    for site in sites:
        head = (
            site.weight in shared
            or bool(outputs & set(site.node.output))
            or site.node.name.startswith(HEAD)
        )
        if precision.scheme in HALVES:
            wanted = [f"gather{precision.code}", f"w{precision.code}"]
            reason = f"{site.kind} layer of an {precision.scheme} bundle, computed as fp32"
        elif site.kind == "embedding":
            wanted = ["gather4", "gather8"] if precision.small_tables else ["gather8"]
            reason = "embedding: rows are looked up"
        elif precision.scheme == "int8" and (
            precision.weights_only or site.node.name.startswith(last_mlp)
        ):
            wanted = ["w8"]
            reason = (
                "weights only: activations stay fp32"
                if precision.weights_only
                else "last MLP: the rounding of its activations meets the logits raw"
            )
        elif head and not precision.small_tables and precision.scheme != "int8":
            # ORT has no fast product of 8-bit weights with fp32 activations.
            wanted = ["w8" if precision.weights_only and site.weight not in shared else "matmul8"]
            reason = "output head: its errors go straight into the result"
        else:
            wanted = ["matmul4" + only] * (head and precision.small_tables)
            wanted += [low, f"w{precision.code}", eight, "w8"]
            reason = f"{site.kind} layer of an {precision} bundle"
        fitting = next((name for name in wanted if treatments.fits(site, name)), None)
        choices[site.node.name] = (
            Choice("fp32", "no low-precision form fits its shape or its range")
            if fitting is None
            else Choice(fitting, reason)
        )
    return choices


def _last_block(sites: Sequence[Site]) -> int:
    blocks = (re.match(r"/layers\.(\d+)/", site.node.name) for site in sites)
    return max((int(block[1]) for block in blocks if block), default=-1)


def recorded(
    graph: Graph,
    sites: Sequence[Site],
    feeds: Sequence[Feeds],
    plan: Mapping[str, str],
    rounding: Rounding,
) -> tuple[Treatments, dict[str, Choice]]:
    """Treatments as `plan` has them by node; ranges are measured here."""
    static = [site for site in sites if plan[site.node.name] == "w8a8"]
    around = [name for site in static for name in (site.node.input[0], site.node.output[0])]
    choices = {
        site.node.name: Choice(plan[site.node.name], "by the plan recorded for this very graph")
        for site in sites
    }
    return Treatments(graph, calibrate.ranges(graph, around, feeds), rounding), choices


def spans(graph: Graph, sites: Sequence[Site], feeds: Sequence[Feeds]) -> dict[str, Range]:
    """The range of every tensor around convolutions and linear layers, over the feeds."""
    around = [
        name
        for site in sites
        if site.kind in ("conv", "linear")
        for name in (site.node.input[0], site.node.output[0])
    ]
    return calibrate.ranges(graph, around, feeds)
