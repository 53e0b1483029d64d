"""Speech from a VITS voice: phonemes -> prior -> flow -> waveform, one utterance at a time.

A bundle of this task has the graphs `encoder`, `flow` and `decoder` (see `exporters/piper.py`) and
this config: `sample_rate_hz`, `phoneme_id_map` (symbol to ids), `symbols` (ids are below it),
`voice` (espeak's name of the language), `speakers`, `speaker_ids` (name to number), and the
defaults `noise_scale`, `noise_w`, `length_scale`.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from numbers import Integral
from typing import Any

import numpy as np

from leangen import phonemes as grapheme
from leangen.errors import RequestError
from leangen.families.sampling import check, is_real, is_whole
from leangen.records import Media, Output, Step
from leangen.session import Session

UNIT = "audio-second"
MEDIA: Media = "audio"
INPUTS = ("text", "phonemes", "phoneme_ids")
EXAMPLE = {"phonemes": grapheme.DEMO_IPA}

Array = np.ndarray[Any, Any]

MOST_SCALE = 100
"""Of noise, rhythm and slowness: at 100 a syllable takes ten seconds."""

MAX_FRAMES = 10_000
"""Longest utterance: 2 minutes at 22,050 Hz, for which the decoder needs about 2 GB."""

MAX_IDS = 4_000
"""Phoneme ids of an utterance, pads included: nearly a minute without a full stop. The encoder pays
attention to each pair of them, for which these take 0.9 GB and half as many again 2.7."""

CALIBRATION_IPA = (
    "ðə kwˈɪk bɹˈaʊn fˈɑːks dʒˈʌmps ˌoʊvɚ ðə lˈeɪzi dˈɑːɡ.",
    "ʃiː hæd jʊɹ dˈɑːɹk sˈuːt ɪn ɡɹˈiːsi wˈɑːʃ wˈɔːɾɚɹ ˈɔːl jˈɪɹ.",
    "wˌaɪ dɪd ðə tʃˈaɪld θɹˈoʊ ðə ɔɹˈɪndʒ bˈɔːl, ænd hˌuː kˈɔːt ɪt?",
    "ˈɛnɚdʒi ɪz mˈɛʒɚd ɪn dʒˈuːlz, ænd ˈɛvɹi dʒˌɛnɚɹˈeɪʃən kˈʌmz wɪð ɐ ɹᵻsˈiːt!",
)
"""English sentences with every common phoneme, in espeak's IPA."""


@dataclass(frozen=True, slots=True)
class Request:
    """What to say: exactly one of `text`, `phonemes` and `phoneme_ids`."""

    text: str | None = None
    """Plain text; needs the `speech` extra."""
    phonemes: str | None = None
    """Espeak's IPA, one utterance a line."""
    phoneme_ids: Sequence[int] | None = None
    """Ids of the voice's own map, pads included; an utterance ends after each end mark."""
    seed: int = 0
    noise_scale: float | None = None
    """Spread of the voice; None, here and below: the voice's own default."""
    noise_w: float | None = None
    """Spread of the rhythm."""
    length_scale: float | None = None
    """Slowness: 2 takes twice as long."""
    durations: Sequence[int] | None = None
    """Frames of each phoneme id over all utterances, instead of the predicted ones."""
    speaker: int | str | None = None
    """Number or name, for voices with several speakers; None is the first."""

    def __post_init__(self) -> None:
        given = [k for k in ("text", "phonemes", "phoneme_ids") if getattr(self, k) is not None]
        if len(given) != 1:
            raise RequestError(
                f"{' and '.join(given) or 'nothing to say'} given: expected exactly one of text, "
                "phonemes and phoneme_ids"
            )
        for name in ("noise_scale", "noise_w", "length_scale"):
            value = getattr(self, name)
            fits = value is None or (is_real(value) and 0 <= value <= MOST_SCALE)
            check(self, **{name: (fits, f"0 to {MOST_SCALE}")})
        check(
            self,
            length_scale=(self.length_scale != 0, "more than 0"),
            text=(isinstance(self.text, str | None), "text"),
            phonemes=(isinstance(self.phonemes, str | None), "text"),
            speaker=(isinstance(self.speaker, int | str | None), "a number or a name"),
            seed=(is_whole(self.seed, 0), "a whole number, 0 or more"),
        )
        for name in ("phoneme_ids", "durations"):
            ids = () if getattr(self, name) is None else getattr(self, name)
            several = isinstance(ids, list | tuple) or np.ndim(ids) == 1
            check(self, **{name: (several, "a list of whole numbers, 0 or more")})
            bad = [v for v in ids if not isinstance(v, Integral) or v < 0]
            if bad:
                raise RequestError(f"{name} hold {bad[0]!r}, expected whole numbers, 0 or more")

    def describe(self) -> Mapping[str, Any]:
        """The options, for the receipt."""
        return {
            "seed": self.seed,
            "noise_scale": self.noise_scale,
            "noise_w": self.noise_w,
            "length_scale": self.length_scale,
            "durations": "predicted" if self.durations is None else "given",
            "speaker": self.speaker,
        }


def prepare(session: Session) -> None:
    """Open the three graphs."""
    for role in ("encoder", "flow", "decoder"):
        session.graph(role)


def run(session: Session, request: Request) -> Generator[Step, None, Output]:
    """Speak: steps `encode`, `flow` and `decode` for each utterance, the last with its seconds.

    The output's array is float32 [samples] in [-1, 1]; `extra` holds `phoneme_ids` and `durations`,
    which asked for again give the same rhythm. Noise depends on the seed, the utterance's place and
    its shape alone, so that two schemes given the same durations speak the same noise.
    """
    config = session.bundle.config
    utterances = _utterances(request, config)
    forced = _forced_durations(request, utterances)
    speaker = np.array([_speaker(request, config)], np.int64)
    noise_scale, noise_w, length_scale = (
        np.float32(config[name] if getattr(request, name) is None else getattr(request, name))
        for name in ("noise_scale", "noise_w", "length_scale")
    )
    rate = int(config["sample_rate_hz"])
    audio: list[Array] = []
    spoken: list[int] = []
    for index, ids in enumerate(utterances):
        noise = np.random.default_rng([request.seed, index])
        rhythm = noise.standard_normal((1, 2, len(ids)), np.float32)
        mean, log_scale, predicted = _run(
            session,
            "encoder",
            speaker,
            phoneme_ids=np.array([ids], np.int64),
            noise=rhythm * noise_w,
        )
        frames = forced[index] if forced else np.ceil(predicted[0, 0] * length_scale)
        _check_frames(frames)
        yield Step(kind="encode", units=0)

        # each phoneme's column, repeated over its frames
        columns = np.repeat(np.arange(len(ids)), frames.astype(np.int64))
        spread = noise.standard_normal((1, mean.shape[1], columns.size), np.float32)
        prior = mean[..., columns] + spread * np.exp(log_scale[..., columns]) * noise_scale
        (latent,) = _run(session, "flow", speaker, prior=prior)
        yield Step(kind="flow", units=0)

        (waveform,) = _run(session, "decoder", speaker, latent=latent)
        audio.append(waveform.reshape(-1))
        spoken += frames.astype(int).tolist()
        yield Step(kind="decode", units=audio[-1].size / rate)
    return Output(
        prompt_units=sum(map(len, utterances)),
        array=np.concatenate(audio),
        media=MEDIA,
        sample_rate_hz=rate,
        extra={"phoneme_ids": [i for ids in utterances for i in ids], "durations": spoken},
    )


def calibration_requests(session: Session) -> list[Request]:
    """A few fixed sentences; phonemes that the voice's map lacks are left out."""
    known = session.bundle.config["phoneme_id_map"]
    lines = ["".join(s for s in line if s in known) for line in CALIBRATION_IPA]
    return [Request(phonemes=line, seed=seed) for seed, line in enumerate(lines) if line.strip()]


def _run(session: Session, role: str, speaker: Array, **feeds: Array) -> list[Array]:
    wanted = session.keep(
        f"speech.inputs.{role}", lambda: {i.name for i in session.graph(role).get_inputs()}
    )
    if "speaker" in wanted:
        feeds["speaker"] = speaker
    return session.run(role, feeds)


def _utterances(request: Request, config: Mapping[str, Any]) -> list[list[int]]:
    """Phoneme ids of each utterance; RequestError when there is nothing to say."""
    id_map = config["phoneme_id_map"]
    if request.phoneme_ids is not None:
        utterances = _split(list(request.phoneme_ids), int(id_map[grapheme.END][-1]))
        largest = max(request.phoneme_ids, default=0)
        if largest >= config["symbols"]:
            raise RequestError(
                f"phoneme id {largest} is unknown: expected 0 to {config['symbols'] - 1}"
            )
    else:
        ipa = request.phonemes
        if ipa is None:
            ipa = grapheme.from_text(str(request.text), config["voice"])
        utterances = grapheme.to_ids(ipa, id_map)
    if not utterances:
        raise RequestError("there is nothing to say: expected at least one phoneme")
    longest = max(map(len, utterances))
    if longest > MAX_IDS:
        raise RequestError(
            f"an utterance has {longest} phoneme ids, expected at most {MAX_IDS}: split the text "
            "into sentences"
        )
    return utterances


def _split(ids: list[int], end: int) -> list[list[int]]:
    """Utterances, each up to and including its end mark."""
    utterances: list[list[int]] = [[]]
    for i in ids:
        utterances[-1].append(i)
        if i == end:
            utterances.append([])
    return [utterance for utterance in utterances if utterance]


def _forced_durations(request: Request, utterances: list[list[int]]) -> list[Array] | None:
    if request.durations is None:
        return None
    lengths = [len(ids) for ids in utterances]
    if len(request.durations) != sum(lengths):
        raise RequestError(
            f"{len(request.durations)} durations given for {sum(lengths)} phoneme ids (pads "
            "included): expected one each, as in a former output's extra['durations']"
        )
    return np.split(np.array(request.durations), np.cumsum(lengths)[:-1])


def _check_frames(frames: Array) -> None:
    total = float(frames.sum())
    if not 0 < total <= MAX_FRAMES:
        raise RequestError(
            f"an utterance would last {total:.0f} frames, expected 1 to {MAX_FRAMES}: "
            "split the text into sentences, or change durations or length_scale"
        )


def _speaker(request: Request, config: Mapping[str, Any]) -> int:
    names, count = config["speaker_ids"], int(config["speakers"])
    number = names.get(request.speaker) if isinstance(request.speaker, str) else request.speaker
    if number is None and request.speaker is None:
        return 0
    if number is None or not 0 <= number < count:
        raise RequestError(
            f"speaker {request.speaker!r} is unknown: expected 0 to {count - 1}"
            + (f" or one of {', '.join(names)}" if names else "")
        )
    return int(number)
