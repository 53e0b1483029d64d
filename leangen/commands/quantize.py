"""`leangen quantize`: a low-precision bundle of an fp32 one."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path

from leangen.console import human_bytes, progress_bar, say
from leangen.errors import RequestError


def declare(add: Callable[..., argparse.ArgumentParser]) -> None:
    """Add the parser."""
    sub = add(
        "quantize",
        run,
        "Make a low-precision bundle from an fp32 one",
        "leangen quantize smollm2-135m --scheme int4-g128 --method gptq -o smollm2-gptq",
    )
    sub.add_argument("bundle", metavar="MODEL")
    how = sub.add_mutually_exclusive_group(required=True)
    how.add_argument("--recipe", type=Path, metavar="FILE", help="replay what `leangen tune` found")
    how.add_argument(
        "--scheme",
        metavar="SCHEME[-asym][-gN][-rN][-wo][-e4][-kvN][-rot]",
        help="fp16, bf16, int8, int4, int3, int2, nf4 or fp4; -asym: zero points, -gN: weights to "
        "a scale, -rN: a part of rank N in half precision, -wo: weights only, -e4: embedding and "
        "head at 4 bits too, -kvN: keys and values in 8, 16 or 32 bits, -rot: rotated weights "
        "(language)",
    )
    sub.add_argument(
        "--method",
        metavar="rtn|imatrix|gptq|awq|hqq",
        help="how weights are rounded; default: as the family does it, rtn as a rule",
    )
    sub.add_argument(
        "--data",
        type=Path,
        help="calibrate on a text file, a folder of images, a .npy or .npz; default: on what the "
        "model makes itself",
    )
    sub.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    sub.add_argument("--force", action="store_true", help="replace the bundle in DIR")


def run(args: argparse.Namespace) -> int:
    """Quantize, and print what came of it."""
    from leangen import quantize as quantizer
    from leangen import recipe
    from leangen.precision import parse
    from leangen.store import Store

    # What was given is read before the work, not after it.
    wanted = None if args.recipe is None else recipe.read(args.recipe)
    precision = None if args.scheme is None else str(parse(args.scheme, method=args.method))
    if wanted is not None and (args.method or args.data):
        raise RequestError("--recipe says all: leave out --method and --data")
    with progress_bar() as progress:
        source = Store().resolve(args.bundle, notify=say, progress=progress)
        if wanted is not None:
            bundle = quantizer.replay(
                source, wanted, args.output, replace=args.force, progress=progress
            )
        elif precision is not None:
            bundle = quantizer.quantize(
                source,
                precision,
                args.output,
                data=args.data,
                replace=args.force,
                progress=progress,
            )
    bits = bundle.quantization["bits_per_weight"]
    print(
        f"{bundle.name}:{bundle.scheme} {human_bytes(bundle.size_bytes)}, "
        f"{bits:.2f} bits a weight, {bundle.path}"
    )
    return 0
