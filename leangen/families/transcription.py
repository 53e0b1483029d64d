"""Speech to text with Whisper (Radford et al., 2212.04356): sound goes in, its words come out.

A bundle of this task has the graphs `encoder` and `decoder` (see `exporters/encoder_graph.py`),
the config keys of a language model, and

    sample_rate_hz, window_samples, mels    what the encoder hears at once
    start, no_timestamps                    the first and the last token before the words
    languages, tasks                        name to token; empty for English-only models
    suppress, suppress_first                tokens that are never chosen, or not as the first word

The unit of work is a second of sound: it is what a user has, it does not depend on a vocabulary or
on how fast someone speaks, and it is the unit of the voices that make speech.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from leangen import audio
from leangen.errors import RequestError
from leangen.families import language, whisper_mel
from leangen.families.decoder import Decoder, Floats, encoder_states
from leangen.families.reply import Reply
from leangen.families.sampling import Chooser, Sampling, check, is_whole
from leangen.families.text_request import MOST_BEAMS
from leangen.families.text_stream import TextStream
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "audio-second"
MEDIA: Media = "text"
INPUTS = ("audio",)
EXAMPLE: Mapping[str, Any] = {"audio": str(Path(__file__).parent.parent / "assets" / "spoken.wav")}

TASKS = ("transcribe", "translate")
_PAUSE = 5 * whisper_mel.RATE_HZ
"""A window may end so many samples before it is full, where it is quietest there."""
_QUIET = 320  # samples over which loudness is taken: 20 ms


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """Sound to write down."""

    audio: str | Path | Sequence[float] | Floats
    """A WAV file, or samples in [-1, 1] of one channel."""
    sample_rate_hz: int = whisper_mel.RATE_HZ
    """Of samples; a file says its own."""
    language: str | None = None
    """What is spoken, such as `en`; None: the model listens for it."""
    task: str = "transcribe"
    """`translate` writes English, whatever is spoken."""
    max_new_tokens: int = 224
    """For each window of 30 s."""
    temperature: float = 0.0
    """0 takes the likeliest token each time."""
    beams: int = 1
    """Above 1: search for the likeliest words with so many beams; nothing is drawn."""
    seed: int = 0

    def __post_init__(self) -> None:
        Sampling(temperature=self.temperature, seed=self.seed)
        check(
            self,
            sample_rate_hz=(is_whole(self.sample_rate_hz, 1), "a rate in Hz, 1 or more"),
            max_new_tokens=(is_whole(self.max_new_tokens, 1), "a whole number, 1 or more"),
            language=(isinstance(self.language, str | None), "a language's code, such as en"),
            task=(isinstance(self.task, str) and self.task in TASKS, " or ".join(TASKS)),
            beams=(
                is_whole(self.beams, 1) and self.beams <= MOST_BEAMS,
                f"a whole number, 1 (off) to {MOST_BEAMS}",
            ),
        )
        if self.beams > 1 and self.temperature:
            raise RequestError("beam search takes no temperature: drop it, or beams")

    def describe(self) -> dict[str, Any]:
        """The options as plain JSON types."""
        return {
            "language": self.language,
            "task": self.task,
            "max_new_tokens": self.max_new_tokens,
            "temperature": self.temperature,
            "beams": self.beams,
            "seed": self.seed,
        }

    def samples(self, rate_hz: int) -> Floats:
        """The sound at that rate; RequestError for a file or an array that is none."""
        if isinstance(self.audio, str | Path):
            samples, from_hz = audio.read_wav(Path(self.audio))
        else:
            samples, from_hz = np.asarray(self.audio, np.float32), self.sample_rate_hz
        if samples.ndim != 1 or not samples.size or not np.isfinite(samples).all():
            raise RequestError(
                f"the audio has shape {list(samples.shape)}, expected finite samples [n] of one "
                "channel, at least one"
            )
        return audio.resample(samples, from_hz, rate_hz)


def prepare(session: Session) -> None:
    """Open the graphs and read the tokenizer."""
    session.graph("encoder")
    session.graph("decoder")
    language.tokenizer(session)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Write down window after window: an `encode` step, `prefill` with the first token, `decode`.

    The last step of a window has its seconds as units. The steps' texts join to the output's;
    `extra["windows"]` has for each the second it begins at, and its text; `extra["language"]` is
    what is spoken. Raises RequestError for a language or a task that the model does not have.
    """
    config = session.bundle.config
    _check_spoken(session, request)
    spoken, text, reason = request.language, "", "eos"
    tokens: list[int] = []
    windows: list[tuple[float, str]] = []
    begin_s = 0.0
    for sound in cut(request.samples(config["sample_rate_hz"]), config["window_samples"]):
        states = encoded(session, sound)
        yield Step(kind="encode", units=0)
        before, seconds = len(text), len(sound) / config["sample_rate_hz"]
        with Decoder(session, config["context_length"], role="decoder", beside=states) as decoder:
            spoken = spoken or _listen(config, decoder)
            prompt = first_tokens(config, request, spoken)
            reply = _reply(session, request, prompt)
            sampling = Sampling(temperature=request.temperature, seed=request.seed + len(windows))
            rules = _Spoken(config)
            logits = decoder.feed(prompt).copy()
            if request.beams > 1:
                mask = rules.mask_after
                steps = language.search(reply, session, request.beams, decoder, logits, mask)
            else:
                chooser = Chooser(sampling, prompt, constraint=rules)
                steps = language.fill(reply, chooser, decoder, prompt, logits)
            for step in steps:
                piece = step.text if text else step.text.lstrip()
                text += piece
                done = reply.stop_reason is not None
                yield replace(step, units=seconds if done else 0, text=piece)
        tokens += reply.tokens
        if reply.stop_reason == "length":
            reason = "length"
        windows.append((begin_s, text[before:].strip()))
        begin_s += seconds
    return Output(
        prompt_units=begin_s,
        text=text,
        tokens=tokens,
        stop_reason=reason,
        extra={"language": spoken, "windows": windows},
    )


def cut(samples: Floats, window: int) -> Iterator[Floats]:
    """Sound in pieces of up to `window` samples that end where it is quietest near their end."""
    pause = min(_PAUSE, window // 6) // _QUIET * _QUIET
    while len(samples) > window:
        near_end = samples[window - pause : window].reshape(-1, _QUIET)
        quietest = int(np.square(near_end).sum(axis=1).argmin())
        end = window - pause + quietest * _QUIET + _QUIET // 2
        yield samples[:end]
        samples = samples[end:]
    yield samples


def encoded(session: Session, sound: Floats) -> dict[str, Floats]:
    """What the decoder hears of a window's samples: its inputs, by name."""
    return encoder_states(session, features=features(session.bundle.config, sound))


def features(config: Mapping[str, Any], sound: Floats) -> Floats:
    """The picture [1, mels, frames] of a window's samples, silence after them."""
    padded = np.zeros(config["window_samples"], np.float32)
    padded[: len(sound)] = sound
    return whisper_mel.log_mel(padded, config["mels"])[None]


def _check_spoken(session: Session, request: Request) -> None:
    config, name = session.bundle.config, session.bundle.name
    languages = config["languages"] or {"en": None}
    if request.language is not None and request.language not in languages:
        raise RequestError(
            f"language is {request.language!r}, expected one that {name} knows: "
            f"{', '.join(languages)}"
        )
    if request.task not in (config["tasks"] or TASKS[:1]):
        raise RequestError(f"{name} does not {request.task}: expected task {TASKS[0]}")


def _listen(config: Mapping[str, Any], decoder: Decoder) -> str:
    """The likeliest language, by the token that would follow the start."""
    languages: Mapping[str, int] = config["languages"]
    if not languages:
        return "en"
    logits = decoder.feed([config["start"]])
    decoder.rewind(0)
    return max(languages, key=lambda name: float(logits[languages[name]]))


def first_tokens(config: Mapping[str, Any], request: Request, spoken: str) -> list[int]:
    """What the decoder begins with; the tokens of language and task are multilingual models'."""
    asked = []
    if config["languages"]:
        asked = [config["languages"][spoken], config["tasks"][request.task]]
    return [config["start"], *asked, config["no_timestamps"]]


def _reply(session: Session, request: Request, prompt: Sequence[int]) -> Reply:
    config = session.bundle.config
    return Reply(
        TextStream(language.tokenizer(session), prompt, ()),
        config["eos_ids"],
        min(request.max_new_tokens, config["context_length"] - len(prompt)),
    )


class _Spoken:
    """Leaves only what is said: no times, no notes, and a first word that is one."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        self._never = np.array(config["suppress"], np.int64)
        self._not_first = np.array(config["suppress_first"], np.int64)
        self._said = 0

    def mask(self, logits: Floats) -> None:
        """Set the logits [vocab] of other tokens to -inf."""
        self.mask_after(logits, self._said)

    def mask_after(self, logits: Floats, said: int) -> None:
        """The same after so many tokens."""
        logits[self._never] = -np.inf
        if said == 0:
            logits[self._not_first] = -np.inf

    def accept(self, token: int) -> None:
        """Take the chosen token."""
        self._said += 1
