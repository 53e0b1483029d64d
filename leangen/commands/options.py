"""Options that several subcommands share, and what they amount to."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from leangen.errors import RequestError

GUESSES = 10
"""What `--speculate` means: more seldom pays, see leangen/families/speculation.py."""
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


def on_every_machine(sub: argparse.ArgumentParser) -> None:
    """`--ray`, of commands that measure."""
    sub.add_argument(
        "--ray",
        dest="on_every_machine",
        action="store_true",
        help="on every machine of a Ray cluster, one at a time on each (leangen[ray])",
    )


def speculate(sub: argparse._ActionsContainer, default: int | None = None) -> None:
    """`--speculate [N]`."""
    sub.add_argument(
        "--speculate",
        type=int,
        nargs="?",
        const=GUESSES,
        default=default,
        metavar="N",
        help=f"guess up to N next tokens from what was said (N: {GUESSES}), 0 is off",
    )


def request_options(sub: argparse.ArgumentParser) -> None:
    """Every option defaults to None: what is not given is the family's or the model's default."""
    group = sub.add_argument_group("what to generate")
    group.add_argument("--prompt", help="text to continue, to speak or to draw")
    group.add_argument("--negative-prompt", help="diffusion: what to keep away from")
    group.add_argument("--seed", type=int)
    group.add_argument("--chat", action="store_true", help="language: through the chat template")
    group.add_argument("--max-new-tokens", type=int)
    group.add_argument("--temperature", type=float, help="0 is greedy")
    group.add_argument("--top-k", type=int, help="draw from this many likeliest tokens")
    group.add_argument("--top-p", type=float, help="draw from the likeliest that hold this share")
    group.add_argument("--min-p", type=float, help="draw from those this likely beside the first")
    group.add_argument("--repetition-penalty", type=float, help="factor; 1 is off")
    group.add_argument("--presence-penalty", type=float, help="from logits of what was said")
    group.add_argument("--frequency-penalty", type=float, help="as often as it was said")
    group.add_argument(
        "--logit-bias",
        action="append",
        type=_bias,
        metavar="TOKEN=BIAS",
        help="added to a token's logit, -inf bans it; may be repeated",
    )
    group.add_argument("--stop", action="append", metavar="TEXT", help="may be repeated")
    group.add_argument("--ignore-eos", action="store_const", const=True)
    group.add_argument("--n", type=int, help="samples, with the seeds that follow --seed")
    group.add_argument("--beams", type=int, help="search with this many beams; 1 is off")
    group.add_argument(
        "--logprobs", type=int, metavar="N", help="--json: log-probabilities, of N likeliest too"
    )
    group.add_argument("--json-schema", metavar="FILE", help="the reply is JSON of this schema")
    group.add_argument("--regex", help="the whole reply matches this")
    group.add_argument("--grammar", metavar="FILE", help="the reply is of this Lark grammar")
    speculate(group)
    group.add_argument("--phonemes", help="speech: IPA in place of text")
    group.add_argument("--phoneme-ids", type=_integers, metavar="IDS", help="speech: `1 20 59 2`")
    group.add_argument("--length-scale", type=float, help="speech: above 1 is slower")
    group.add_argument("--noise-scale", type=float, help="speech: 0 is monotone")
    group.add_argument("--audio", metavar="WAV", help="transcription: what to write down")
    group.add_argument("--language", metavar="CODE", help="transcription: what is spoken, like en")
    group.add_argument("--task", help="transcription: `transcribe`, or `translate` into English")
    group.add_argument("--seconds", type=float, help="sound: how much to make")
    group.add_argument("--count", type=int, help="samples or images to draw")
    group.add_argument("--data", help="flow: rows (.npy, .csv) whose log-density is wanted")
    group.add_argument(
        "--steps", type=_steps, help="diffusion steps; auto: as few as draw the same, measured once"
    )
    group.add_argument(
        "--reuse", type=int, metavar="N", help="diffusion: the UNet's inner levels every N steps"
    )
    group.add_argument("--sampler", help="diffusion: ddim, heun, dpmpp_2m, unipc, ...")
    group.add_argument("--guidance", type=float, metavar="SCALE", help="diffusion: 1 is none")
    group.add_argument("--guidance-rescale", type=float, metavar="SHARE", help="diffusion: 0 to 1")
    group.add_argument(
        "--image", metavar="FILE", help="diffusion: start from, or enlarge; encoder: encode"
    )
    group.add_argument("--latent", metavar="FILE", help="one-shot decoder: .npy in place of noise")
    group.add_argument("--strength", type=float, help="diffusion: how far to leave --image, 0 to 1")
    group.add_argument("--mask", metavar="FILE", help="diffusion: white where to paint anew")
    group.add_argument(
        "--condition",
        dest="conditions",
        action="append",
        type=_condition,
        metavar="NAME=VALUE",
        help="diffusion: `class=3`, `class=otter`, `crop=0,0`; may be repeated",
    )
    group.add_argument(
        "--input",
        dest="inputs",
        action="append",
        type=_named,
        metavar="NAME=VALUE",
        help="pipelines: an input by name; may be repeated",
    )


_REQUEST_FIELDS = (
    *("seed", "max_new_tokens", "temperature", "top_k", "top_p", "repetition_penalty", "stop"),
    *("ignore_eos", "phonemes", "phoneme_ids", "length_scale", "noise_scale", "count", "data"),
    *("steps", "conditions", "min_p", "presence_penalty", "frequency_penalty", "logit_bias", "n"),
    *("beams", "logprobs", "regex", "speculate", "sampler", "guidance", "guidance_rescale"),
    *("latent", "negative_prompt", "reuse"),
    *("image", "strength", "mask", "audio", "language", "task", "seconds"),
)


def share(text: str) -> float:
    """`5%` or `0.05`."""
    return float(text.removesuffix("%")) / 100 if text.endswith("%") else float(text)


def _integers(text: str) -> list[int]:
    return [int(part) for part in text.replace(",", " ").split()]


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS, such as 42=-1.5") from None


def _file(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise RequestError(f"cannot read {option} {path}: {error}") from None


def _steps(text: str) -> int | str:
    return text if text == "auto" else int(text)


def _condition(text: str) -> tuple[str, Any]:
    """A number, several with commas between, or a name."""
    name, _, value = text.partition("=")
    try:
        numbers = [float(part) for part in value.split(",")]
    except ValueError:
        return name, value
    return name, numbers if len(numbers) > 1 else numbers[0]


def _named(text: str) -> tuple[str, str | int | float]:
    name, sign, value = text.partition("=")
    if not (name and sign):
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    for number in (int, float):
        try:
            return name, number(value)
        except ValueError:
            pass
    return name, value


def _embodied(text: str) -> tuple[float, float]:
    try:
        total_kg, lifetime_years = map(float, text.split(","))
    except ValueError as error:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not KG,YEARS: give kgCO2e of the hardware and the years of its use, "
            "such as 250,4"
        ) from error
    return total_kg, lifetime_years


def request(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The prompt and the options that were given, under the names of the families' requests."""
    options = {
        name: getattr(args, name) for name in _REQUEST_FIELDS if getattr(args, name) is not None
    }
    if "stop" in options:
        options["stop"] = tuple(options["stop"])
    for name in ("conditions", "logit_bias"):
        if name in options:
            options[name] = dict(options[name])
    for name, path in (("json_schema", args.json_schema), ("lark", args.grammar)):
        if path is not None:
            options[name] = _file(f"--{name.replace('lark', 'grammar').replace('_', '-')}", path)
    options |= dict(args.inputs or ())
    if args.chat:
        if args.prompt is None:
            raise RequestError("--chat needs a --prompt: the user's message")
        options["messages"] = [{"role": "user", "content": args.prompt}]
        return None, options
    return args.prompt, options
