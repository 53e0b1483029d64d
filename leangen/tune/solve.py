"""Which treatment for each node: the least cost within a budget of harm.

A multiple-choice knapsack. With SciPy (the `tune` extra) an integer program, solved to a stated
gap; without it the Lagrangian relaxation: nodes choose by cost + price x harm, the price is found
by bisection, and the dual bound says how far from the best the answer can be.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

TIME_LIMIT_S = 20.0
_GAP = 1e-4


@dataclass(frozen=True, slots=True)
class Option:
    """One treatment of a node."""

    cost: float
    harm: float
    """What it adds to the squared error of the output, or to another loss that adds up."""


@dataclass(frozen=True, slots=True)
class Solution:
    """A treatment for each node."""

    choices: Mapping[str, str]
    cost: float
    harm: float
    gap: float
    """Relative distance to a cost that no choice can beat."""


Table = Mapping[str, Mapping[str, Option]]
"""Options by node and treatment."""


def worthwhile(options: Mapping[str, Option], tied: float) -> dict[str, Option]:
    """The options that cost less than every one of less harm, by more than a share `tied`.

    >>> list(worthwhile({"a": Option(9, 1), "b": Option(8.9, 2), "c": Option(5, 3)}, 0.02))
    ['a', 'c']
    """
    kept: dict[str, Option] = {}
    for name, option in sorted(options.items(), key=lambda item: (item[1].harm, item[1].cost)):
        if all(option.cost < other.cost * (1 - tied) for other in kept.values()):
            kept[name] = option
    return kept


def least_harm(table: Table) -> Solution:
    """The most exact choice."""
    return _solution(
        table,
        {node: min(o, key=lambda t: (o[t].harm, o[t].cost)) for node, o in table.items()},
        0.0,
    )


def solve(table: Table, budget: float) -> Solution | None:
    """The cheapest choice whose harm is at most `budget`; None when there is none."""
    if least_harm(table).harm > budget:
        return None
    try:
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import coo_array
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "scipy":
            raise
        return relaxed(table, budget)
    pairs = [(node, t) for node in table for t in table[node] if table[node][t].harm <= budget]
    options = [table[node][treatment] for node, treatment in pairs]
    rows = {node: row for row, node in enumerate(table)}
    places = ([rows[node] for node, _ in pairs], list(range(len(pairs))))
    one_each = coo_array((np.ones(len(pairs)), places), shape=(len(rows), len(pairs)))
    cost = np.array([option.cost for option in options])
    harm = np.array([option.harm for option in options])
    shares = harm / max(budget, float(np.finfo(np.float64).tiny))
    found = milp(
        cost / max(float(cost.max()), float(np.finfo(np.float64).tiny)),
        constraints=[
            LinearConstraint(one_each, 1, 1),
            LinearConstraint(shares[None], -np.inf, 1),
        ],
        integrality=np.ones(len(pairs)),
        bounds=Bounds(0, 1),
        options={"time_limit": TIME_LIMIT_S, "mip_rel_gap": _GAP},
    )
    if found.x is None:
        return relaxed(table, budget)
    chosen = {pair[0]: pair[1] for pair, x in zip(pairs, found.x, strict=True) if x > 0.5}
    solution = _solution(table, chosen, float(found.mip_gap or 0.0))
    return solution if solution.harm <= budget * (1 + 1e-6) else relaxed(table, budget)


def relaxed(table: Table, budget: float) -> Solution | None:
    """As `solve`, by Lagrangian relaxation and without SciPy."""
    exact = least_harm(table)
    if exact.harm > budget:
        return None
    best, bound = exact, -np.inf
    low, high = 0.0, _dearest(table)
    for _ in range(80):
        price = (low + high) / 2
        choices = {
            node: min(options, key=lambda t: options[t].cost + price * options[t].harm)
            for node, options in table.items()
        }
        found = _solution(table, choices, 0.0)
        bound = max(bound, found.cost + price * (found.harm - budget))
        if found.harm <= budget:
            best = found if found.cost <= best.cost else best
            high = price
        else:
            low = price
    best = _filled(table, best, budget)
    gap = (best.cost - bound) / best.cost if best.cost > 0 else 0.0
    return Solution(best.choices, best.cost, best.harm, max(0.0, float(gap)))


def _dearest(table: Table) -> float:
    """A price of harm at which every node takes its least harm."""
    steps = [
        (a.cost - b.cost) / (b.harm - a.harm)
        for options in table.values()
        for a in options.values()
        for b in options.values()
        if b.harm > a.harm and a.cost > b.cost
    ]
    return max(steps, default=1.0) * 2


def _filled(table: Table, start: Solution, budget: float) -> Solution:
    """Spend what is left of the budget: the largest single saving that fits, again and again."""
    choices, cost, harm = dict(start.choices), start.cost, start.harm
    while True:
        moves = [
            (table[node][now].cost - option.cost, node, treatment)
            for node, now in choices.items()
            for treatment, option in table[node].items()
            if option.cost < table[node][now].cost
            and harm + option.harm - table[node][now].harm <= budget
        ]
        if not moves:
            return Solution(choices, cost, harm, 0.0)
        saving, node, treatment = max(moves)
        harm += table[node][treatment].harm - table[node][choices[node]].harm
        cost -= saving
        choices[node] = treatment


def _solution(table: Table, choices: Mapping[str, str], gap: float) -> Solution:
    chosen = [table[node][treatment] for node, treatment in choices.items()]
    return Solution(dict(choices), sum(o.cost for o in chosen), sum(o.harm for o in chosen), gap)
