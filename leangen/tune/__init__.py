"""`leangen tune`: the cheapest treatment of every node that still meets a quality budget.

Harm of each node (`harms`), cost of each node (`costs`), the cheapest choice within a budget of
harm (`solve`), then the truth: the bundle is made and its loss measured end to end, and the budget
of harm is tightened or widened by what that says, a few times. What is kept meets the budget as
measured. For time or energy, steps, threads and spinning are looked for as well (`settings`).
"""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from leangen import families, family_recipes, quality, quantize
from leangen.bundle import Bundle
from leangen.console import Progress, with_u
from leangen.errors import RequestError
from leangen.quality import Measure, Task
from leangen.recipe import NodeRecipe
from leangen.session import Session
from leangen.tune import costs, harms, settings, solve
from leangen.tune.costs import Objective
from leangen.tune.solve import Option, Solution, Table

TRIALS = 6
"""End-to-end checks at most."""
CLOSE = 0.94
"""A loss of this share of the budget is near enough to stop."""
TIED = 0.05
"""A share by which the costs of a node differ that is none: timings are not exact."""
NARROW = 0.02
"""The search ends when the budget of harm is known this well."""

LIMITS: Mapping[str, Mapping[str, str]] = {
    "language": {"kl": "KL divergence", "nll": "log-perplexity change"},
    "flow/density": {"kl": "KL divergence", "nll": "KL divergence"},
    "flow/speech": {"mel": "log-mel distance"},
    "diffusion": {"rmse": "relative RMSE", "psnr": "PSNR"},
    "oneshot": {"rmse": "relative RMSE", "psnr": "PSNR"},
}
"""The measure that each kind of budget is about, by family."""
_LINEAR = ("kl", "nll")
"""Losses that grow with the square of the error, as harm does; the others grow with its root."""


@dataclass(frozen=True, slots=True)
class Budget:
    """A limit of quality: at most, or for `psnr` at least, `limit`."""

    kind: str
    limit: float

    def measured(self, bundle: Bundle, measures: list[Measure]) -> Measure:
        """The measure that it is about."""
        name = LIMITS[families.key(bundle)][self.kind]
        return next(measure for measure in measures if measure.name == name)

    def loss(self, value: float) -> float:
        """A figure that falls with quality and is 0 at best."""
        return float(10 ** (-value / 20)) if self.kind == "psnr" else max(value, 0.0)

    @property
    def most(self) -> float:
        """The limit as a loss."""
        return self.loss(self.limit)

    def check(self, bundle: Bundle) -> None:
        """RequestError for a kind that the family lacks, or a limit that is no limit."""
        known = LIMITS.get(families.key(bundle), {})
        if self.kind not in known:
            options = " or ".join(
                f"--{'min' if kind == 'psnr' else 'max'}-{kind} ({name})"
                for kind, name in known.items()
            )
            raise RequestError(
                f"{bundle.name} ({families.key(bundle)}) has no budget of that kind: "
                f"expected {options}"
            )
        if not (math.isfinite(self.limit) and self.limit > 0):
            raise RequestError(f"the budget is {self.limit:g}, expected a number above 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Tuned:
    """What was found."""

    recipe: NodeRecipe
    measures: list[Measure]
    loss: Measure
    """The budget's measure, end to end."""
    solution: Solution
    objective: Objective
    costs: costs.Costs
    trials: int

    def cost_of(self, bundle: Bundle) -> float | None:
        """The modelled cost of another bundle of the model; None for treatments not looked at."""
        total = 0.0
        nodes = {key.rpartition(":")[2]: e for key, e in bundle.quantization["nodes"].items()}
        for name, options in self.costs.items():
            treatment = nodes[name]["treatment"] if name in nodes else "fp32"
            if treatment not in options:
                return None
            total += options[treatment]
        return total


def tune(
    bundle: Bundle,
    budget: Budget,
    *,
    minimize: str,
    task: Task,
    home: Path,
    progress: Progress,
    meter: str | None = None,
    threads: int | None = None,
) -> Tuned:
    """Find the recipe for the fp32 `bundle`.

    minimize: `size`, `latency` or `energy`. home: where sensitivities are kept. Raises RequestError
    for a budget that cannot be met, with the best that can be reached.
    """
    budget.check(bundle)
    if bundle.scheme != "fp32":
        raise RequestError(f"given {bundle.name}:{bundle.scheme}, expected the fp32 bundle to tune")
    aim = costs.objective(minimize, meter)
    progress(0, 0, "calibrating")
    calibration = quantize.Calibration(bundle, family_recipes.of(bundle).tuned_method)
    found = harms.measure(bundle, calibration, home, progress)
    prices = costs.measure(bundle, calibration, found, aim, progress, threads)
    tied = 0.0 if aim.name == "size" else TIED
    table = {
        node: solve.worthwhile(
            {t: Option(prices[node][t], harm) for t, harm in options.items()}, tied
        )
        for node, options in found.items()
    }
    reference = Session(bundle, threads=threads)
    observed = quality.observe(reference, None, task)
    run: dict[str, int] = {}
    if aim.name != "size":

        def within(measures: list[Measure], share: float) -> bool:
            loss = budget.loss(budget.measured(bundle, measures).value)
            return loss**2 <= share * budget.most**2

        steps = settings.fewest_steps(reference, task, observed, within, progress)
        run = {} if steps is None else {"steps": steps}
    judged = replace(task, steps=run.get("steps", task.steps))

    def recipe(solution: Solution, how: Mapping[str, Any] | None = None) -> NodeRecipe:
        choices, method = solution.choices, calibration.method
        return NodeRecipe(bundle.name, bundle.digest, choices, how or {}, method, dict(run))

    @contextmanager
    def made(solution: Solution) -> Iterator[Bundle]:
        with tempfile.TemporaryDirectory(prefix="leangen-") as folder:
            out = Path(folder) / "trial"
            yield quantize.replay(bundle, recipe(solution), out, calibration=calibration)

    def judge(solution: Solution) -> list[Measure]:
        with made(solution) as low:
            seen = quality.observe(Session(low, threads=threads), observed, judged)
            return quality.measure(low, observed, seen)

    best, measures, trials = _search(bundle, budget, table, judge, progress)
    if aim.name != "size" and threads is None:
        with made(best) as low:
            run |= settings.best_run(low, aim, progress)
    loss = budget.measured(bundle, measures)
    how = {
        "budget": {"kind": budget.kind, "limit": budget.limit},
        "loss": loss.to_json(),
        "minimized": aim.name,
        "minimized_how": aim.reason,
        "modelled_cost": best.cost,
        "cost_unit": aim.unit,
        "gap": best.gap,
        "trials": trials,
    }
    return Tuned(
        recipe=recipe(best, how),
        measures=measures,
        loss=loss,
        solution=best,
        objective=aim,
        costs=prices,
        trials=trials,
    )


def judge_others(
    bundle: Bundle,
    others: list[Bundle],
    task: Task,
    progress: Progress,
    *,
    threads: int | None = None,
) -> list[list[Measure]]:
    """The measures of other bundles of the model against its fp32 one."""
    sessions = [Session(other, threads=threads) for other in others]
    return quality.evaluate(sessions, Session(bundle, threads=threads), task, progress)


def _search(
    bundle: Bundle,
    budget: Budget,
    table: Table,
    judge: Callable[[Solution], list[Measure]],
    progress: Progress,
) -> tuple[Solution, list[Measure], int]:
    """The cheapest solution that was seen to meet the budget, its measures, how many were tried."""
    exact = solve.least_harm(table)
    worst = sum(max(option.harm for option in options.values()) for options in table.values())
    low, high = exact.harm, worst * (1 + 1e-9)  # harm known to be fine, harm known to be too much
    power = 1.0 if budget.kind in _LINEAR else 2.0
    harm = budget.most**power if power == 2 else math.sqrt(max(low, worst * 1e-4) * worst)
    harm = min(max(harm, low), high)
    best: tuple[Solution, list[Measure]] | None = None
    seen: dict[tuple[tuple[str, str], ...], float] = {}
    while len(seen) < TRIALS and high > low * (1 + NARROW):
        solution = solve.solve(table, harm) or exact
        key = tuple(sorted(solution.choices.items()))
        if key not in seen:
            progress(len(seen), TRIALS, f"checking end to end, trial {len(seen) + 1}")
            measures = judge(solution)
            seen[key] = budget.loss(budget.measured(bundle, measures).value)
            if seen[key] <= budget.most and (best is None or solution.cost < best[0].cost):
                best = solution, measures
        loss = seen[key]
        if loss > budget.most:
            high = harm
        elif loss >= CLOSE * budget.most or solution.harm >= worst:
            break
        else:
            low = harm
        # one step along loss ~ harm^(1/power); halving (of the logarithm) where that leads nowhere
        step = harm * (0.97 * budget.most / max(loss, 1e-12)) ** power
        inside = low * (1 + NARROW) < step < high / (1 + NARROW)
        harm = step if inside else math.sqrt(max(low, high * 1e-4) * high)
    trials = len(seen)
    if best is None:
        trials += 1
        measures = judge(exact)
        if budget.loss(budget.measured(bundle, measures).value) <= budget.most:
            best = exact, measures
    if best is None:
        reached = budget.measured(bundle, measures)
        raise RequestError(
            f"no treatment of the nodes meets {_told(budget)}: the best that can be reached is "
            f"{reached.name} {with_u(reached.value, reached.u, reached.unit).strip()}; "
            "allow more loss, or stay with fp32"
        )
    return best[0], best[1], trials


def _told(budget: Budget) -> str:
    return f"--{'min' if budget.kind == 'psnr' else 'max'}-{budget.kind} {budget.limit:g}"
