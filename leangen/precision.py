"""How a low precision is written: the scheme, then what differs from its defaults.

    SCHEME[-asym][-gN][-rN][-wo][-e4][-kvN][-rot][-METHOD]   int8   int4-g128-rot-gptq   int4-kv8

`-asym` gives integer codes a zero point per block, `-gN` sets how many weights share a scale,
`-rN` keeps a part of rank N of each weight in half precision, so that codes hold but the rest,
`-wo` quantizes weights only (activations stay fp32), `-e4` takes embedding and output head to 4
bits as well (they keep 8 otherwise), `-kvN` keeps keys and values in N bits (8, 16 or 32) where
leangen's kernels run, `-rot` rotates a language model's weights first (`leangen.rotation`), METHOD
says how weights are rounded (by the scheme's own
search, `rtn`, unless the model's family has a usual method).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from leangen import methods
from leangen.errors import UnknownSchemeError
from leangen.schemes import SCHEMES

LARGEST_RANK = 256
GROUPS = (16, 32, 64, 128, 256)
HALVES = ("fp16", "bf16")
FORM = "SCHEME[-asym][-gN][-rN][-wo][-e4][-kvN][-rot][-METHOD]"
_KV = {"8": "int8", "16": "fp16", "32": "fp32"}
_TEXT = re.compile(
    r"(?P<scheme>[a-z]+\d+)(?P<asym>-asym)?(?:-g(?P<group>\d+))?(?:-r(?P<rank>\d+))?"
    r"(?P<wo>-wo)?(?P<e4>-e4)?(?:-kv(?P<kv>8|16|32))?(?P<rot>-rot)?"
    r"(?:-(?P<method>[a-z]+))?"
)


@dataclass(frozen=True, slots=True)
class Precision:
    """A scheme with its options."""

    scheme: str
    asymmetric: bool = False
    group: int | None = None
    """Weights that share a scale; None: the scheme's own choice."""
    rank: int = 0
    weights_only: bool = False
    small_tables: bool = False
    """Embedding and output head at 4 bits, not 8."""
    kv: str | None = None
    """How keys and values are kept: `int8`, `fp16`, `fp32`; None: as whoever runs it says."""
    rotated: bool = False
    """Whether the weights of a language model are rotated before they are rounded."""
    method: str | None = None
    """How weights are rounded; None: as the model's family does it, the scheme's own as a rule."""

    @property
    def code(self) -> str:
        """The scheme as treatments write it: `4` for int4, `16` for fp16, else its name."""
        plain = {"fp16": "16"}.get(self.scheme, self.scheme.removeprefix("int"))
        options = ("-asym" * self.asymmetric, f"-g{self.group}" if self.group else "")
        return plain + "".join(options) + (f"-r{self.rank}" if self.rank else "")

    def __str__(self) -> str:
        options = (
            "-asym" * self.asymmetric,
            f"-g{self.group}" if self.group else "",
            f"-r{self.rank}" if self.rank else "",
            "-wo" * self.weights_only,
            "-e4" * self.small_tables,
            f"-kv{self.kv.lstrip('fpint')}" if self.kv else "",
            "-rot" * self.rotated,
            f"-{self.method}" if self.method else "",
        )
        return self.scheme + "".join(options)


def parse(text: str, *, method: str | None = None) -> Precision:
    """Read a precision; `method` stands in for one that the text does not name.

    Raises UnknownSchemeError for what is not known and for options that the scheme lacks.

    >>> str(parse("int4-g128", method="gptq"))
    'int4-g128-gptq'
    """
    found = _TEXT.fullmatch(text)
    scheme = found["scheme"] if found else text.split("-")[0]
    if scheme not in SCHEMES:
        raise UnknownSchemeError(
            f"scheme {scheme!r} is unknown: expected one of {', '.join(SCHEMES)}"
        )
    if found is None:
        raise UnknownSchemeError(
            f"{text!r} is not a precision: expected {FORM}, such as int4-asym-g128-gptq"
        )
    if method is not None and found["method"] not in (None, method):
        raise UnknownSchemeError(f"{text!r} names its method already: leave out --method {method}")
    precision = Precision(
        scheme,
        asymmetric=bool(found["asym"]),
        group=int(found["group"]) if found["group"] else None,
        rank=int(found["rank"] or 0),
        weights_only=bool(found["wo"]),
        small_tables=bool(found["e4"]),
        kv=_KV.get(found["kv"]),
        rotated=bool(found["rot"]),
        method=found["method"] or method,
    )
    _check(precision)
    return precision


def _check(precision: Precision) -> None:
    scheme, integers = precision.scheme, precision.scheme.startswith("int")
    if precision.method not in (None, *methods.METHODS):
        raise UnknownSchemeError(
            f"method {precision.method!r} is unknown: expected one of {', '.join(methods.METHODS)}"
        )
    if precision.group not in (None, *GROUPS):
        raise UnknownSchemeError(
            f"{precision.group} weights to a scale: expected one of {', '.join(map(str, GROUPS))}"
        )
    if precision.rank > LARGEST_RANK:
        raise UnknownSchemeError(f"rank is {precision.rank}, expected at most {LARGEST_RANK}")
    without = None
    if precision.asymmetric and (not integers or scheme == "int8"):
        without = "-asym: only int4, int3 and int2 have zero points"
    elif precision.group and (scheme in (*HALVES, "int8")):
        without = f"-g{precision.group}: its blocks are fixed"
    elif precision.rank and scheme not in methods.SCHEMES:
        without = f"-r{precision.rank}: that is for int4, int3 and int2"
    elif precision.weights_only and not integers:
        without = "-wo: its activations are fp32 already"
    elif precision.small_tables and scheme in (*HALVES, "int8"):
        without = "-e4: that goes with schemes of 4 bits or fewer"
    elif precision.kv and scheme in HALVES:
        without = "-kvN: its attention runs on ONNX Runtime's kernels, which keep fp32"
    elif precision.rotated and scheme in HALVES:
        without = "-rot: halves lose too little to rounding"
    elif precision.method not in (None, "rtn") and scheme not in methods.SCHEMES:
        without = f"-{precision.method}: methods are for int4, int3 and int2"
    if without is not None:
        plain = replace(precision, asymmetric=False, group=None, rank=0, weights_only=False)
        plain = replace(plain, small_tables=False, kv=None, rotated=False, method=None)
        raise UnknownSchemeError(f"{scheme} has no {without}; use {plain} as it is")
