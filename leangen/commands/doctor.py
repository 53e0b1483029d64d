"""`leangen doctor`: what works on this machine, what does not, and what would mend it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from leangen.console import print_json


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add("doctor", run, "What works on this machine, and how to mend what does not",
              "leangen doctor")  # fmt: skip
    sub.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run(args: argparse.Namespace) -> int:
    """Print a line for each finding, its remedy below; 1 when something should be mended."""
    from dataclasses import asdict

    from leangen import doctor

    findings = doctor.examine()
    problems = [finding for finding in findings if finding.status == "problem"]
    if args.json:
        print_json({"ok": not problems, "findings": [asdict(finding) for finding in findings]})
    else:
        for finding in findings:
            print(f"{finding.status:7}  {finding.what:11}  {finding.detail}")
            if finding.remedy:
                print(f"{'':7}  {'':11}  remedy: {finding.remedy}")
    return 1 if problems else 0
