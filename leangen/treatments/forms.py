"""The names of treatments, read.

A treatment is a form and the code of a weight, such as `w4`, `matmul4-asym-g128`, `gather8`:

    w8a8        7 of 8 bits per row: static QDQ around a convolution, u8 x s8 arithmetic
    wCODE       unpacked by standard ops that ORT folds when it loads; small on disk, runs as fp32
    matmulCODE  integers: MatMulNBits, activations rounded to int8 per block (or fp32, with -wo);
                nf4 and fp4: MatMulBnb4, activations in fp32
    gatherCODE  embedding: only the rows asked for are unpacked

CODE is 8, 4, 3, 2, nf4, fp4, 16 (half precision) or bf16, with -asym, -gN, -rN and -wo as in
`leangen.precision`; integers of 4 bits or fewer take -rN.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache

from leangen import schemes

TABLES = ("fp4", "nf4")
"""Schemes whose codes index a table."""
_TREATMENT = re.compile(
    r"(?P<form>w|matmul|gather)(?P<code>8|4|3|2|nf4|fp4|16|bf16)"
    r"(?P<asym>-asym)?(?:-g(?P<group>\d+))?(?:-r(?P<rank>\d+))?(?P<wo>-wo)?"
)
STANDARD = (
    *("w2", "w3", "w4", "wnf4", "wfp4", "w8", "w16", "wbf16"),
    *("matmul2", "matmul3", "matmul4", "matmulnf4", "matmulfp4", "matmul8"),
    *("gather4", "gather8", "gather16", "gatherbf16", "w8a8"),
)
"""The treatments without options."""


@dataclass(frozen=True, slots=True)
class Form:
    """A treatment's name, read."""

    kind: str
    """`w8a8`, `w`, `matmul` or `gather`."""
    scheme: str
    asymmetric: bool = False
    group: int | None = None
    rank: int = 0
    """Of the part of the weight that stands beside the codes in half precision."""
    weights_only: bool = False

    @property
    def code_bits(self) -> int:
        """Bits of a weight's code."""
        bits: int = schemes.get(self.scheme).BITS
        return bits


@cache
def read(treatment: str) -> Form:
    """The form that a treatment's name stands for; ValueError when it is no treatment."""
    if treatment == "w8a8":
        return Form("w8a8", "int8")
    found = _TREATMENT.fullmatch(treatment)
    if found is None:
        raise ValueError(f"{treatment!r} is no treatment: expected one such as w4, matmul4, w8a8")
    scheme = {"16": "fp16"}.get(found["code"], found["code"])
    return Form(
        found["form"],
        f"int{scheme}" if scheme.isdigit() else scheme,
        bool(found["asym"]),
        int(found["group"]) if found["group"] else None,
        int(found["rank"] or 0),
        bool(found["wo"]),
    )


def code_bits(treatment: str) -> int:
    """Bits of a weight's code: 32 for `fp32`, a node left as it is."""
    return 32 if treatment == "fp32" else read(treatment).code_bits
