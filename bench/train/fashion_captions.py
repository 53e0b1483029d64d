"""Captions of Fashion-MNIST's ten labels, to train on and held out to test with."""

from __future__ import annotations

NOUNS = (
    ("t-shirt", "tee", "short-sleeved top", "T-shirt"),
    ("pair of trousers", "pair of pants", "trouser", "pair of jeans"),
    ("pullover", "sweater", "jumper", "woollen pullover"),
    ("dress", "gown", "summer dress", "evening dress"),
    ("coat", "overcoat", "winter coat", "long coat"),
    ("sandal", "open sandal", "flip-flop", "sandal with straps"),
    ("shirt", "button-up shirt", "blouse", "collared shirt"),
    ("sneaker", "trainer", "running shoe", "sports shoe"),
    ("bag", "handbag", "purse", "shoulder bag"),
    ("ankle boot", "boot", "leather boot", "bootie"),
)
"""What each label is called."""
TEMPLATES = (
    *("{}", "a {}", "the {}", "a photo of a {}", "a picture of a {}", "an image of one {}"),
    *("a grey {} on a black background", "draw a {}", "I would like a {}", "a new {}"),
)
HELD_OUT_NOUNS = (
    *("crew-neck tee", "pair of slacks", "knitted sweater", "frock", "trench coat"),
    *("beach sandal", "button-down shirt", "tennis shoe", "tote bag", "chelsea boot"),
)
"""One of each label, of which no caption to train on is made."""
HELD_OUT_TEMPLATE = "please show me a {}"


def training() -> list[list[str]]:
    """The captions of each label."""
    return [[form.format(noun) for noun in nouns for form in TEMPLATES] for nouns in NOUNS]


def held_out() -> list[str]:
    """A caption for each label that a model has not read: another noun in another sentence."""
    return [HELD_OUT_TEMPLATE.format(noun) for noun in HELD_OUT_NOUNS]
