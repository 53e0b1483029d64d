"""Rotary embeddings: how fast each pair of a head turns with its position, by kind.

Su et al., "RoFormer" (arXiv 2104.09864). Parameters have the names of transformers'
`rope_parameters`; `divisors`, which GGUF files may hold, divide the frequencies of any kind.
A new kind is a function and one line in `KINDS`.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import numpy as np

Parameters = Mapping[str, Any]
Angles = np.ndarray[Any, np.dtype[np.float64]]
Turned = tuple[Angles, float]
"""Radians per position of each pair, and the attention factor: of all cosines and sines."""
_FAR = 2**31 - 1
"""The last position that the graph's inputs can name."""
_ORIGINAL = "original_max_position_embeddings"


class Kind(NamedTuple):
    """A kind of rotation, and the numbers that it takes beside `rope_theta`."""

    turn: Callable[[Angles, Parameters, int], Turned]
    """From the plain frequencies, the parameters and the bundle's context."""
    needs: tuple[str, ...] = ()
    may: tuple[str, ...] = ()
    """Have a default, also where they are null."""
    lists: tuple[str, ...] = ()
    """Of a number for each pair."""


def frequencies(parameters: Parameters, rotated: int, context: int) -> Turned:
    """Radians per position [rotated / 2], and the attention factor.

    `context` is how many tokens the bundle takes, by which longrope chooses its factors.
    """
    exponents = np.arange(0, rotated, 2, dtype=np.float64) / rotated
    plain = float(parameters["rope_theta"]) ** -exponents
    turned, factor = KINDS[parameters["rope_type"]].turn(plain, parameters, context)
    return turned / np.asarray(parameters.get("divisors", 1.0), np.float64), factor


def check(parameters: Parameters, rotated: int) -> None:
    """ValueError that names the number which a kind of rotation lacks or cannot have."""
    kind = KINDS[parameters["rope_type"]]
    given = [key for key in kind.may if parameters.get(key) is not None]
    for key in ("rope_theta", *kind.needs, *given):
        if not positive(parameters.get(key)):
            raise ValueError(
                f"{key} {reprlib.repr(parameters.get(key))} for its rotation, expected a number "
                "above 0"
            )
    for key in (*kind.lists, *(["divisors"] if "divisors" in parameters else [])):
        _check_list(key, parameters.get(key), rotated // 2)
    try:
        with np.errstate(all="ignore"):
            both = [frequencies(parameters, rotated, context) for context in (1, _FAR)]
    except (ZeroDivisionError, OverflowError, ValueError):
        both = []
    if not both or not all(np.isfinite([*turned, factor]).all() for turned, factor in both):
        numbers = {key: parameters[key] for key in ("rope_theta", *kind.needs, *given)}
        raise ValueError(f"{numbers} for its rotation, of which no angles can be computed")


def _check_list(key: str, value: Any, pairs: int) -> None:
    if type(value) is list and len(value) == pairs and all(map(positive, value)):
        return
    found = f"{len(value)} values" if type(value) is list else reprlib.repr(value)
    raise ValueError(
        f"{key} of {found} for its rotation, expected a list of {pairs} numbers above 0"
    )


def positive(value: Any) -> bool:
    """Whether it is a finite number above 0."""
    return type(value) in (int, float) and 0 < value < math.inf


def room(parameters: Parameters, stated: int) -> tuple[int, int]:
    """Tokens that a bundle takes unless others are asked for, and the most that it can.

    `stated` is the context that the model's description has.
    """
    if parameters["rope_type"] == "longrope":
        return max(1, min(int(parameters[_ORIGINAL]), stated)), stated
    if parameters["rope_type"] == "yarn":
        return stated, max(stated, int(min(parameters["factor"] * parameters[_ORIGINAL], _FAR)))
    return stated, stated


def reason(parameters: Parameters, context: int, most: int) -> str:
    """What a user should know of a bundle's context that the kind of rotation decides; or ""."""
    kind, original = parameters["rope_type"], parameters.get(_ORIGINAL, most)
    if kind == "longrope" and context > original:
        return (
            f"longrope's long factors hold at every length (transformers takes the short ones for "
            f"up to {original} tokens)"
        )
    if kind == "longrope" and context < most:
        return (
            f"longrope's short factors, which hold for up to {original} tokens; "
            f"`leangen export --context N` takes up to {most}, then with its long factors"
        )
    if kind == "yarn" and context < most:
        return f"yarn's factor reaches {most} tokens: `leangen export --context N` takes them"
    return "dynamic scaling begins beyond it and is not run" if kind == "dynamic" else ""


def _default(plain: Angles, parameters: Parameters, context: int) -> Turned:
    """As trained; "dynamic" too, which transformers scales only beyond the context."""
    return plain, 1.0


def _linear(plain: Angles, parameters: Parameters, context: int) -> Turned:
    """Positions are interpolated (Chen et al., arXiv 2306.15595)."""
    return plain / float(parameters["factor"]), 1.0


def _llama3(plain: Angles, parameters: Parameters, context: int) -> Turned:
    """Llama 3.1's: slow rotations are slowed down, quick ones kept, those between blended."""
    factor, low = float(parameters["factor"]), float(parameters["low_freq_factor"])
    high = float(parameters["high_freq_factor"])
    turns = float(parameters[_ORIGINAL]) * plain / (2 * np.pi)
    blend = np.clip((turns - low) / (high - low), 0, 1)
    return plain * (blend + (1 - blend) / factor), 1.0


def _yarn(plain: Angles, parameters: Parameters, context: int) -> Turned:
    """YaRN (Peng et al., arXiv 2309.00071): pairs from `low` to `high` are slowed more and more."""
    pairs, factor = len(plain), float(parameters["factor"])

    def pair_of(turns: float) -> float:
        """The pair that turns so many times over the original context."""
        per_turn = parameters[_ORIGINAL] / (turns * 2 * math.pi)
        return pairs * math.log(per_turn) / math.log(parameters["rope_theta"])

    low = pair_of(parameters.get("beta_fast") or 32)
    high = pair_of(parameters.get("beta_slow") or 1)
    if parameters.get("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, 2 * pairs - 1)
    slowed = np.clip((np.arange(pairs) - low) / (high - low or 0.001), 0, 1)
    return plain * (1 - slowed + slowed / factor), _yarn_attention(parameters)


def _yarn_attention(parameters: Parameters) -> float:
    if parameters.get("attention_factor") is not None:
        return float(parameters["attention_factor"])
    stretch = max(math.log(parameters["factor"]), 0.0)
    one, all_dims = parameters.get("mscale"), parameters.get("mscale_all_dim")
    if not (one and all_dims):
        one, all_dims = 1.0, 0.0
    return (0.1 * float(one) * stretch + 1) / (0.1 * float(all_dims) * stretch + 1)


def _longrope(plain: Angles, parameters: Parameters, context: int) -> Turned:
    """LongRoPE (Ding et al., arXiv 2402.13753): divisors of the pairs, for short or long texts."""
    original = parameters[_ORIGINAL]
    divisors = parameters["long_factor" if context > original else "short_factor"]
    attention = parameters.get("attention_factor")
    if attention is None:
        factor = parameters.get("factor") or parameters["max_position_embeddings"] / original
        attention = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    return plain / np.asarray(divisors, np.float64), float(attention)


KINDS: Mapping[str, Kind] = {
    "default": Kind(_default),
    "dynamic": Kind(_default, ("factor",)),
    "linear": Kind(_linear, ("factor",)),
    "llama3": Kind(_llama3, ("factor", "low_freq_factor", "high_freq_factor", _ORIGINAL)),
    "longrope": Kind(
        _longrope, (_ORIGINAL,), ("attention_factor", "factor"), ("short_factor", "long_factor")
    ),
    "yarn": Kind(
        _yarn,
        ("factor", _ORIGINAL),
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
    ),
}
"""By the `rope_type` of transformers."""
