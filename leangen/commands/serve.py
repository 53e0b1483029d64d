"""`leangen serve`: an edge server that speaks the OpenAI API."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "serve",
        run,
        "Serve models over the OpenAI API, with the joules of every answer",
        "leangen serve smollm2-135m:int4 piper-joe:int8 --max-batch 8",
    )
    sub.add_argument("models", nargs="+", metavar="MODEL", help="as elsewhere, or NAME=MODEL")
    sub.add_argument("--host", default="127.0.0.1", help="another needs --api-key-file")
    sub.add_argument("--port", type=int, default=8000, help="0 takes a free one")
    sub.add_argument("--api-key-file", type=Path, metavar="FILE", help="one NAME:KEY a line")
    sub.add_argument(
        "--ray", action="store_true", help="on a Ray cluster's machines (leangen[ray])"
    )
    sub.add_argument("--threads", type=int, help="default: physical cores that we may use")
    size = sub.add_argument_group("how much")
    size.add_argument("--max-batch", type=int, default=8, help="sequences that run at once")
    size.add_argument("--context", type=int, default=2048, help="tokens of one sequence")
    size.add_argument("--max-queue", type=int, default=256, help="requests that wait, per model")
    size.add_argument("--memory", metavar="SIZE", help="of all models together, such as 2GB")
    size.add_argument("--max-body", default="2MB", metavar="SIZE", help="of a request")
    size.add_argument("--rate", type=int, metavar="N", help="requests of one client a minute")
    size.add_argument("--timeout", type=float, default=600.0, metavar="S", help="of a request")
    size.add_argument("--grace", type=float, default=30.0, metavar="S", help="to finish at SIGTERM")
    size.add_argument(
        "--idle-release", type=float, default=300.0, metavar="S", help="unload unused models after"
    )
    power = sub.add_argument_group("how much energy")
    power.add_argument(
        "--budget",
        action="append",
        default=[],
        metavar="day=5000J",
        help="refuse beyond it; also month=20g, in gCO2e",
    )
    power.add_argument(
        "--cheaper", action="store_true", help="near a budget's end, use a smaller precision"
    )
    power.add_argument("--power-cap", type=float, metavar="W", help="wait between steps above it")
    power.add_argument("--region", help="whose grid the carbon figure assumes, e.g. FR")
    power.add_argument(
        "--intensity", metavar="G|FILE", help="gCO2e/kWh, or a CSV over time: allows `defer`"
    )
    power.add_argument("--meter", metavar="SPEC", help="a name of `leangen meters`, exec:, file:")
    power.add_argument("--otel", action="store_true", help="spans and metrics by OTLP")
    power.add_argument("--tag", help="a word to find these generations by in the ledger")


def run(args: argparse.Namespace) -> int:
    """Serve until SIGTERM or Ctrl-C."""
    from leangen.serve import on_ray, options
    from leangen.serve import run as server
    from leangen.serve.worker import Limits

    serve = on_ray.run if args.ray else server.run
    serve(
        options.Options(
            models=args.models,
            host=args.host,
            port=args.port,
            api_key_file=args.api_key_file,
            limits=Limits(
                max_batch=args.max_batch,
                context=args.context,
                queue=args.max_queue,
                idle_release_s=args.idle_release,
            ),
            memory_bytes=None if args.memory is None else options.size(args.memory),
            max_body_bytes=options.size(args.max_body),
            per_minute=args.rate,
            timeout_s=args.timeout,
            grace_s=args.grace,
            budgets=[options.budget(text) for text in args.budget],
            power_cap_w=args.power_cap,
            cheaper=args.cheaper,
            threads=args.threads,
            region=args.region,
            intensity=args.intensity,
            meter=args.meter,
            tag=args.tag,
            otel=args.otel,
        )
    )
    return 0
