"""Sound sample by sample from causal convolutions (WaveNet, van den Oord et al., 1609.03499).

A bundle of this task has the graph `model` (see `exporters/wavenet.py`) and in its config

    sample_rate_hz
    levels            mu-law levels that a sample is one of
    states            name to shape of what each layer remembers
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from leangen.families.sampling import Chooser, Sampling, check, is_real
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "audio-second"
MEDIA: Media = "audio"
INPUTS = ()
EXAMPLE: dict[str, Any] = {}

Floats = np.ndarray[Any, np.dtype[np.float32]]

PER_STEP = 160
"""Samples between two steps that are told of: telling costs more than a sample does."""
LONGEST_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How much sound to make."""

    seconds: float = 1.0
    seed: int = 0
    temperature: float = 1.0

    def __post_init__(self) -> None:
        fits = is_real(self.seconds) and 0 < self.seconds <= LONGEST_S
        check(self, seconds=(fits, f"more than 0 and at most {LONGEST_S:g}"))
        self.sampling()

    def sampling(self) -> Sampling:
        """How samples are chosen."""
        return Sampling(temperature=self.temperature, seed=self.seed)

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        return {"seconds": self.seconds, "seed": self.seed, "temperature": self.temperature}


def prepare(session: Session) -> None:
    """Open the graph."""
    session.graph("model")


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Make sound; a `decode` step for every `PER_STEP` samples. It begins after silence."""
    config = session.bundle.config
    rate_hz, levels = config["sample_rate_hz"], config["levels"]
    tokens = _drawn(session, request, max(1, round(request.seconds * rate_hz)))
    out: list[int] = []
    done = 0
    for token in tokens:
        out.append(token)
        if len(out) - done == PER_STEP:
            yield Step(kind="decode", units=PER_STEP / rate_hz)
            done = len(out)
    if done < len(out):
        yield Step(kind="decode", units=(len(out) - done) / rate_hz)
    return Output(array=expand(out, levels), media=MEDIA, sample_rate_hz=rate_hz, tokens=out)


def draw(session: Session, seed: int) -> list[int]:
    """The levels of a quarter of a second."""
    count = max(2, session.bundle.config["sample_rate_hz"] // 4)
    return list(_drawn(session, Request(seed=seed), count))


def logits(session: Session, tokens: Sequence[int], seed: int = 0) -> Floats:
    """Logits [n, levels] before each of the first n samples of a sound, whatever its seed."""
    config = session.bundle.config
    fed = [config["levels"] // 2, *tokens[:-1]]
    return _fed(session, fed, silence(config))[0]


def silence(config: Mapping[str, Any]) -> dict[str, Floats]:
    """What the layers remember before the first sample."""
    return {name: np.zeros(shape, np.float32) for name, shape in config["states"].items()}


def expand(tokens: Sequence[int], levels: int) -> Floats:
    """Samples in [-1, 1] of mu-law levels (ITU-T G.711, with mu one less than the levels)."""
    mu = levels - 1
    companded = 2 * np.asarray(tokens, np.float64) / mu - 1
    sound = np.sign(companded) * np.expm1(np.abs(companded) * np.log1p(mu)) / mu
    return np.asarray(sound, np.float32)


def _drawn(session: Session, request: Request, count: int) -> Generator[int]:
    config = session.bundle.config
    chooser = Chooser(request.sampling(), ())
    states, token = silence(config), config["levels"] // 2
    for _ in range(count):
        rows, states = _fed(session, [token], states)
        token = chooser.choose(rows[-1]).token
        yield token


def _fed(
    session: Session, tokens: Sequence[int], states: Mapping[str, Floats]
) -> tuple[Floats, dict[str, Floats]]:
    """Logits [n, levels] after each token, and what the layers then remember."""
    names = list(states)
    feeds = {"samples": np.array([tokens], np.int64), **states}
    rows, *kept = session.run("model", feeds, ["logits", *(f"next_{name}" for name in names)])
    return rows[0], dict(zip(names, kept, strict=True))


def calibration_requests(session: Session) -> list[Request]:
    """A fiftieth of a second, from two seeds."""
    return [Request(seconds=0.02, seed=20_000 + index) for index in range(2)]
