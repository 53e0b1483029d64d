"""Options that several subcommands share, and what they amount to."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

GUESSES = 10
"""What `--speculate` means: more seldom pays, see leangen/families/speculation.py."""
SPECULATE: Mapping[str, Any] = {
    "type": int,
    "nargs": "?",
    "const": GUESSES,
    "metavar": "N",
    "help": f"guess up to N next tokens from what was said (N: {GUESSES}), 0 is off",
}
METER_HELP = "exec:COMMAND, file:PATH or a name of `leangen meters`; default: what is best there"


def json_and_threads(sub: argparse.ArgumentParser) -> None:
    """`--threads` and `--json`."""
    sub.add_argument("--threads", type=int, help="default: physical cores that we may use")
    sub.add_argument("--json", action="store_true", help="one JSON document on standard output")


def run_options(sub: argparse.ArgumentParser, *, as_json: bool = True) -> None:
    """How a generation runs and is accounted for."""
    if as_json:
        json_and_threads(sub)
    else:
        sub.add_argument("--threads", type=int, help="default: physical cores that we may use")
    sub.add_argument("--region", help="whose grid the carbon figure assumes, e.g. FR")
    sub.add_argument("--meter", metavar="SPEC", help=METER_HELP)
    sub.add_argument("--intensity", metavar="G|FILE", help="gCO2e/kWh, or a CSV of time, gCO2e/kWh")
    sub.add_argument(
        "--embodied", type=_embodied, metavar="KG,YEARS", help="making the hardware; gives SCI"
    )
    sub.add_argument(
        "--activations",
        choices=("int8", "fp32"),
        default="int8",
        help="fp32: low-bit layers do not round activations (slower)",
    )
    sub.add_argument(
        "--kernels",
        choices=("auto", "ort"),
        default="auto",
        help="ort: ONNX Runtime's own, for comparison; default: leangen's where they fit",
    )
    kv_option(sub)


def device_option(sub: argparse.ArgumentParser) -> None:
    """`--device`."""
    sub.add_argument(
        "--device",
        default="cpu",
        metavar="cpu|cuda[:N]|auto",
        help="an NVIDIA card needs leangen[gpu]; auto takes one where all is there (default: cpu)",
    )


def kv_option(sub: argparse.ArgumentParser) -> None:
    """`--kv`."""
    sub.add_argument(
        "--kv",
        choices=("fp32", "fp16", "int8"),
        help="language: how keys and values are kept on leangen's kernels; default: as the scheme "
        "says, else fp16",
    )


def on_every_machine(sub: argparse.ArgumentParser) -> None:
    """`--ray`, of commands that measure."""
    sub.add_argument(
        "--ray",
        dest="on_every_machine",
        action="store_true",
        help="on every machine of a Ray cluster, one at a time on each (leangen[ray]); {node} in a "
        "file's name becomes the node's id, for nodes that share a folder",
    )


def loading(args: argparse.Namespace) -> dict[str, Any]:
    """The options of `leangen.load` that `run_options` and `device_option` read."""
    names = (
        *("threads", "region", "intensity", "embodied", "meter"),
        *("activations", "kernels", "device", "kv"),
    )
    return {name: getattr(args, name) for name in names}


def share(text: str) -> float:
    """`5%` or `0.05`."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _embodied(text: str) -> tuple[float, float]:
    try:
        total_kg, lifetime_years = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KG,YEARS: give kgCO2e of the hardware and the years of its use, "
            "such as 250,4"
        ) from error
    return total_kg, lifetime_years
