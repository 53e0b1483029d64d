"""`leangen lint`: what ONNX Runtime runs slowly or wrongly on a CPU, and the mend."""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from leangen.console import print_json, progress_bar, say
from leangen.errors import RequestError

if TYPE_CHECKING:
    from leangen.lint import Finding

MOST_NODES = 3
"""Names listed of the nodes that a rule found alike."""


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "lint",
        run,
        "What ONNX Runtime runs slowly or wrongly on a CPU in a bundle or any ONNX file",
        "leangen lint model.onnx --fix -o mended.onnx",
    )
    sub.add_argument("path", metavar="MODEL|ONNX", help="a bundle's name or folder, or a file")
    sub.add_argument("--fix", action="store_true", help="write a mended copy to -o")
    sub.add_argument(
        "--exact", action="store_true", help="only fixes that change nothing but float rounding"
    )
    sub.add_argument("-o", "--output", type=Path, metavar="OUT", help="folder or .onnx file")
    sub.add_argument("--force", action="store_true", help="replace OUT")
    sub.add_argument("--no-timing", action="store_true", help="do not measure what a trap costs")
    sub.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Print the findings; 0 when there are none or they were fixed, 1 when there are."""
    from leangen import lint
    from leangen.store import Store

    if args.fix != (args.output is not None):
        raise RequestError("--fix and -o OUT go together: give both, or neither")
    path = Path(args.path)
    with progress_bar() as progress:
        timed = not args.no_timing
        if path.is_file() or path.suffix == ".onnx":
            found = lint.lint(path, path.name, timed=timed, progress=progress)
            bundle = None
        else:
            bundle = Store().resolve(args.path, notify=say, progress=progress)
            found = lint.lint_bundle(bundle, timed=timed, progress=progress)
        fixed: Mapping[str, int] = {}
        if args.fix and bundle is None:
            fixed = lint.fix_file(path, args.output, exact=args.exact, replace=args.force)
        elif args.fix and bundle is not None:
            fixed = lint.fix_bundle(bundle, args.output, exact=args.exact, replace=args.force)
    if args.json:
        print_json({"findings": [one.to_json() for one in found], "fixed": dict(fixed)})
    else:
        for line in _lines(found):
            print(line)
        for name, count in fixed.items():
            rule = next(rule for rule in lint.RULES if rule.name == name)
            print(f"fixed {name} x {count}: changes {rule.changes or 'nothing but float rounding'}")
    if args.fix:
        say(f"wrote {args.output}")
    return 1 if found and not args.fix else 0


def _lines(found: Sequence[Finding]) -> list[str]:
    """Findings that are alike together: what, where, cost, remedy."""
    from leangen.charts import si

    if not found:
        return ["no trap found"]
    alike: dict[tuple[str, str, str], list[Finding]] = defaultdict(list)
    for one in found:
        alike[one.rule.name, one.graph, one.what].append(one)
    lines = []
    for (rule, graph, what), group in alike.items():
        names = [one.node for one in group if one.node]
        more = f" and {len(names) - MOST_NODES} more" if len(names) > MOST_NODES else ""
        where = f" at {', '.join(names[:MOST_NODES])}{more}" if names else ""
        lines.append(f"{graph}: {rule}: {what}{where}")
        lines.append(f"  {group[0].rule.why}")
        costs = [one.cost for one in group if one.cost is not None]
        if costs:
            before, after = sum(c.before_s for c in costs), sum(c.after_s for c in costs)
            of = "opening" if group[0].rule.at_opening else "a run"
            lines.append(
                f"  {of} takes {si(before, None, 's')} here, {si(after, None, 's')} fixed "
                f"({before / after:.3g}x, {len(costs)} of {len(group)} timed one by one; output "
                f"moves by {max(c.difference for c in costs):.1g} of its largest)"
            )
        if not group[0].fixable:
            lines.append(
                f"  no fix here: {group[0].rule.remedy or 'the pattern is not one of ours'}"
            )
        elif group[0].rule.changes:
            lines.append(f"  --fix changes: {group[0].rule.changes}")
    return lines
