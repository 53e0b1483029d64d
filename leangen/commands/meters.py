"""`leangen meters`: what energy sensors there are, and fitting the estimate to one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.commands.options import METER_HELP
from leangen.console import print_json
from leangen.errors import RequestError


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("meters", run, "What energy sensors there are, or why not", "leangen meters")
    sub.add_argument(
        "action",
        nargs="?",
        choices=("list", "calibrate"),
        default="list",
        help="calibrate: fit the estimate to a counter, a battery or --meter, and keep the fit",
    )
    sub.add_argument("--root", type=Path, default=Path("/"), help="another file system root")
    sub.add_argument("--meter", metavar="SPEC", help=METER_HELP)
    sub.add_argument(
        "--seconds", type=float, default=5.0, help="calibrate: length of each of its 9 windows"
    )
    sub.add_argument("--json", action="store_true")


def run(args: argparse.Namespace) -> int:
    """Print a line for each sensor, or what was fitted."""
    from leangen import meters as sensors
    from leangen.meters import listing

    if not args.root.is_dir():
        raise RequestError(f"--root {args.root} is not a folder")
    if args.action == "calibrate":
        return _calibrate(args)
    rows = sensors.describe(args.root, meter=args.meter)
    if args.json:
        print_json(rows)
        return 0
    for line in listing.lines(rows):
        print(line)
    return 0


def _calibrate(args: argparse.Namespace) -> int:
    from dataclasses import asdict

    from leangen import meters as sensors
    from leangen.meters import calibrate, fit

    if args.root != Path("/"):
        raise RequestError("calibrate runs a load on this machine: it takes no --root")
    selection = sensors.select(meter=args.meter)
    found = calibrate.calibrate(selection, args.seconds)
    path = fit.save(found)
    if args.json:
        print_json(asdict(found) | {"u_systematic": found.u_systematic, "path": str(path)})
        return 0
    print(
        f"{found.idle_w:.3g} W idle + {found.core_w:.3g} W per busy core, fitted to "
        f"{', '.join(found.reference)}: residual {found.residual:.1%}, the estimate is now within "
        f"{found.u_systematic:.0%}; kept in {path}"
    )
    return 0
