"""What a generation is asked for, as command-line options, by the family that takes them."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from leangen.commands.options import SPECULATE
from leangen.errors import RequestError


def _integers(text: str) -> list[int]:
    try:
        return [int(part) for part in text.replace(",", " ").split()]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not whole numbers such as 1 20 59") from None


def _bias(text: str) -> tuple[int, float]:
    token, _, value = text.partition("=")
    try:
        return int(token), float(value)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not TOKEN=BIAS, such as 42=-1.5") from None


def _file(option: str, path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise RequestError(f"cannot read {option} {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise RequestError(f"cannot read {option} {path}: it is not UTF-8 text") from None


def _steps(text: str) -> int | str:
    try:
        return text if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or auto") from None


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


_Options = Mapping[str, Mapping[str, Any]]

_ANY: _Options = {
    "--seed": {"type": int, "help": "same seed, same output"},
    "--count": {"type": int, "help": "samples, images or rows to draw"},
}
_LANGUAGE: _Options = {
    "--max-new-tokens": {"type": int},
    "--temperature": {"type": float, "help": "0 is greedy; also of flows' draws"},
    "--top-k": {"type": int, "help": "draw from this many likeliest tokens"},
    "--top-p": {"type": float, "help": "draw from the likeliest that hold this share"},
    "--min-p": {"type": float, "help": "draw from those this likely beside the first"},
    "--repetition-penalty": {"type": float, "help": "factor; 1 is off"},
    "--presence-penalty": {"type": float, "help": "from logits of what was said"},
    "--frequency-penalty": {"type": float, "help": "as often as it was said"},
    "--logit-bias": {
        "action": "append",
        "type": _bias,
        "metavar": "TOKEN=BIAS",
        "help": "added to a token's logit, -inf bans it; may be repeated",
    },
    "--stop": {"action": "append", "metavar": "TEXT", "help": "may be repeated"},
    "--ignore-eos": {"action": "store_const", "const": True},
    "--n": {"type": int, "help": "samples, with the seeds that follow --seed"},
    "--beams": {"type": int, "help": "search with this many beams; 1 is off"},
    "--logprobs": {
        "type": int,
        "metavar": "N",
        "help": "--json: log-probabilities, of N likeliest too",
    },
    "--regex": {"help": "the whole reply matches this"},
    "--speculate": SPECULATE,
}
_SOUND: _Options = {
    "--phonemes": {"help": "speech: IPA in place of text"},
    "--phoneme-ids": {"type": _integers, "metavar": "IDS", "help": "speech: `1 20 59 2`"},
    "--length-scale": {"type": float, "help": "speech: above 1 is slower"},
    "--noise-scale": {"type": float, "help": "speech: 0 is monotone"},
    "--audio": {"metavar": "WAV", "help": "transcription: what to write down"},
    "--language": {"metavar": "CODE", "help": "transcription: what is spoken, like en"},
    "--task": {"help": "transcription: `transcribe`, or `translate` into English"},
    "--seconds": {"type": float, "help": "sound: how much to make"},
}
_IMAGES: _Options = {
    "--negative-prompt": {"help": "what to keep away from"},
    "--condition": {
        "dest": "conditions",
        "action": "append",
        "type": _condition,
        "metavar": "NAME=VALUE",
        "help": "`label=3`, `label=bag`, `crop=0,0`; may be repeated",
    },
    "--steps": {"type": _steps, "help": "or auto: as few as draw the same, measured once"},
    "--sampler": {"help": "ddim, heun, dpmpp_2m, unipc, ..."},
    "--guidance": {"type": float, "metavar": "SCALE", "help": "1 is none"},
    "--guidance-rescale": {"type": float, "metavar": "SHARE", "help": "0 to 1"},
    "--reuse": {"type": int, "metavar": "N", "help": "the UNet's inner levels every N steps"},
    "--image": {"metavar": "FILE", "help": "start from, or enlarge; encoder: encode"},
    "--strength": {"type": float, "help": "how far to leave --image, 0 to 1"},
    "--mask": {"metavar": "FILE", "help": "white where to paint anew"},
    "--data": {"help": "flow: rows (.npy, .csv) whose log-density is wanted"},
    "--latent": {"metavar": "FILE", "help": "one-shot decoder: .npy in place of noise"},
}


def request_options(sub: argparse.ArgumentParser) -> None:
    """Every option defaults to None: what is not given is the family's or the model's default."""
    group = sub.add_argument_group("what to generate")
    group.add_argument("--prompt", help="text to continue, to speak, to draw or to embed")
    group.add_argument(
        "--input",
        dest="inputs",
        action="append",
        type=_named,
        metavar="NAME=VALUE",
        help="pipelines: an input by name; may be repeated",
    )
    language = sub.add_argument_group("language")
    language.add_argument("--chat", action="store_true", help="through the chat template")
    language.add_argument("--json-schema", metavar="FILE", help="the reply is JSON of this schema")
    language.add_argument("--grammar", metavar="FILE", help="the reply is of this Lark grammar")
    fields = [
        each.add_argument(option, **how).dest
        for each, options in (
            (group, _ANY),
            (language, _LANGUAGE),
            (sub.add_argument_group("speech and transcription"), _SOUND),
            (sub.add_argument_group("diffusion, flows and one-shot models"), _IMAGES),
        )
        for option, how in options.items()
    ]
    sub.set_defaults(request_fields=fields)


def request(args: argparse.Namespace) -> tuple[str | None, dict[str, Any]]:
    """The prompt and the options that were given, under the names of the families' requests."""
    options = {
        name: getattr(args, name) for name in args.request_fields if getattr(args, name) is not None
    }
    if "stop" in options:
        options["stop"] = tuple(options["stop"])
    for name in ("conditions", "logit_bias"):
        if name in options:
            options[name] = dict(options[name])
    if args.json_schema is not None:
        options["json_schema"] = _file("--json-schema", args.json_schema)
    if args.grammar is not None:
        options["lark"] = _file("--grammar", args.grammar)
    options |= dict(args.inputs or ())
    if args.chat:
        if args.prompt is None:
            raise RequestError("--chat needs a --prompt: the user's message")
        options["messages"] = [{"role": "user", "content": args.prompt}]
        return None, options
    return args.prompt, options
