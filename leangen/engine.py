"""The one place where running meets measuring.

A family yields steps; the engine times each, reads the meters at the two edges of the generation,
and hands back the output with its receipt. It never asks which family it runs.
"""

from __future__ import annotations

import atexit
import dataclasses
import os
import weakref
from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np

from leangen import attribution, carbon, clock, energy, families, host, meters
from leangen.budget import Guard
from leangen.bundle import Bundle
from leangen.errors import RequestError
from leangen.ledger import Ledger, Ticket
from leangen.receipts import Measured, receipt_of
from leangen.records import Media, Output, Receipt, Step
from leangen.session import Session

BASELINE_S = 1.0
LONGEST_BASELINE_S = 5.0


@dataclasses.dataclass(frozen=True, slots=True)
class Result:
    """The output of one generation and what it cost."""

    output: Output
    receipt: Receipt

    @property
    def text(self) -> str | None:
        """The generated text (language)."""
        return self.output.text

    @property
    def tokens(self) -> Sequence[int] | None:
        """The generated token ids (language)."""
        return self.output.tokens

    @property
    def properties(self) -> Mapping[str, Any] | None:
        """What a model with a second head says of its text: `value` and `error` by name."""
        samples = self.output.extra.get("samples")
        return samples[0].properties or None if samples else None

    @property
    def array(self) -> np.ndarray[Any, Any] | None:
        """Audio `[samples]`, images `[n, height, width, channels]` or rows `[n, d]`."""
        return None if self.output.array is None else np.asarray(self.output.array)

    def save(self, path: str | Path) -> Path:
        """Write the output by the suffix of `path`: .txt, .wav, .png, .csv, .npy.

        A .wav and a .png keep the receipt in their metadata.

        Raises RequestError when this output has no such form.
        """
        from leangen import media

        return media.save(self.output, Path(path), self.receipt)


class Stream(Iterator[Step]):
    """The steps of one generation as they are done; `result` once they are all taken.

    Closing it early (or an exception inside it, or the end of the process) still accounts for
    what was spent: the receipt goes to the ledger and to `receipt`.
    """

    def __init__(
        self, engine: Engine, request: Any, *, repeats: int = 1, aligned: bool = False
    ) -> None:
        self.receipt: Receipt | None = None
        self._ticket: Ticket | None = None
        self._output: Output | None = None
        self._steps = self._run(engine, request, repeats, aligned)
        close_at_exit(self)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Stop generating; the energy spent so far is accounted for."""
        self._steps.close()

    @property
    def result(self) -> Result:
        """Output and receipt, which is then on the disk if the engine keeps a ledger.

        Raises RequestError while steps are left to take, StorageError if the ledger took it not.
        """
        made = self.made
        if self._ticket is not None:
            self._ticket.wait()
        return made

    @property
    def made(self) -> Result:
        """Output and receipt, whether the ledger takes it or not.

        Raises RequestError while steps are left to take.
        """
        if self._output is None or self.receipt is None:
            raise RequestError(
                "the stream is not finished: take all its steps, then ask for result"
            )
        return Result(self._output, self.receipt)

    def _run(self, engine: Engine, request: Any, repeats: int, aligned: bool) -> Generator[Step]:
        steps: list[tuple[str, float, int]] = []
        marks: dict[int, int] = {}
        counts: Counter[str] = Counter()
        left = repeats
        started_at = clock.utc_now()
        cpu = engine._cpu_times()
        window = meters.begin(engine.selection, aligned=aligned)
        begin_ns = clock.monotonic_ns()
        running = engine.family.run(engine.session, request)
        try:
            while True:
                step_ns = clock.monotonic_ns()
                try:
                    step = next(running)
                except StopIteration as stop:
                    self._output = stop.value
                    left -= 1
                    if left < 1:
                        return
                    running = engine.family.run(engine.session, request)
                    continue
                steps.append((step.kind, step.units, clock.monotonic_ns() - step_ns))
                counts.update(step.counts)
                if meters.keep_up(window) and (energy_uj := window.energy_uj) is not None:
                    marks[len(steps) - 1] = energy_uj
                yield step
        finally:
            running.close()
            duration_ns = clock.monotonic_ns() - begin_ns
            windows = meters.end(window)
            if steps:
                measured = Measured(
                    started_at=started_at,
                    begin_boottime_ns=window.begin_boottime_ns,
                    duration_ns=duration_ns,
                    windows=windows,
                    steps=steps,
                    marks=marks,
                    counts=counts,
                    cpu=None if cpu is None else (cpu, attribution.cpu_times()),
                    repeats=repeats,
                )
                self.receipt = engine.receipt(request, self._output, measured)
                self._ticket = engine.keep(self.receipt)


def _check_text(name: str, value: Any) -> None:
    """Raise RequestError for a string, however deep in `value`, that UTF-8 cannot hold.

    A terminal's bytes that are not UTF-8 come as such strings; neither a tokenizer nor a receipt
    can take them.
    """
    if isinstance(value, str):
        try:
            value.encode()
        except UnicodeEncodeError as error:
            broken = value[error.start : error.end]
            raise RequestError(f"{name} has {broken!r} in it, expected UTF-8 text") from None
    elif isinstance(value, Mapping):
        for part in value.values():
            _check_text(name, part)
    elif isinstance(value, list | tuple) and not (value and isinstance(value[0], int | float)):
        for part in value:
            _check_text(name, part)


_streams: weakref.WeakSet[Any] = weakref.WeakSet()


def close_at_exit(stream: Any) -> None:
    """Have `stream.close()` called before the process ends, if it is still there."""
    _streams.add(stream)


@atexit.register
def _close_streams() -> None:
    # Later, when Python drops them, nothing can be imported or read any more.
    for stream in list(_streams):
        with suppress(ValueError):  # another thread is inside it
            stream.close()


os.register_at_fork(after_in_child=_streams.clear)  # they are the parent's


class Engine:
    """One loaded model: generates, measures, keeps the account.

    `leangen.load` makes one. Steps of one engine run one generation at a time.
    """

    def __init__(
        self,
        session: Session,
        *,
        ledger: Ledger | None = None,
        footprint: carbon.Footprint | None = None,
        tag: str | None = None,
        guard: Guard | None = None,
        baseline_s: float = BASELINE_S,
        meter: str | None = None,
        probes: Path | None = None,
        root: Path = Path("/"),
        selection: meters.Selection | None = None,
    ) -> None:
        """`selection`: meters that are in use already, in place of `meter`."""
        self.session = session
        self.family = families.of(session.bundle)
        self.ledger = ledger
        self.footprint = footprint or carbon.footprint()
        if not isinstance(tag, str | None):
            raise RequestError(f"tag is {tag!r}, expected text")
        _check_text("tag", tag)
        self.tag = tag
        self.guard = guard
        self.on_receipt: list[Callable[[Receipt], None]] = []
        """Called with each receipt after it went to the ledger, in the thread that generates."""
        self.selection = selection or meters.probed(
            meters.select(root, device=session.device.kind, meter=meter),
            boot_id=host.host(root=root).boot_id,
            cache=probes,
        )
        self._baseline_s = baseline_s
        self._baseline: energy.Baseline | None = None
        self.family.prepare(session)

    @property
    def bundle(self) -> Bundle:
        """The bundle that runs."""
        return self.session.bundle

    @property
    def name(self) -> str:
        """Model and scheme; what an output is called by default."""
        return f"{self.bundle.name}-{self.bundle.scheme}"

    @property
    def media(self) -> Media:
        """What its outputs are."""
        return families.media(self.bundle)

    def request(self, prompt: Any = None, /, **options: Any) -> Any:
        """The family's validated request; RequestError names an option that it does not take."""
        kind = self.family.Request
        fields = [field.name for field in dataclasses.fields(kind)]
        unknown = [name for name in options if name not in fields]
        if unknown:
            raise RequestError(
                f"{self.bundle.name} ({self.bundle.family}) takes no option {unknown[0]!r}: "
                f"it takes {', '.join(fields)}"
            )
        if prompt is not None:
            if not self.family.INPUTS:
                raise RequestError(
                    f"{self.bundle.name} ({self.bundle.family}) takes no prompt: "
                    f"its options are {', '.join(fields)}"
                )
            options[self.family.INPUTS[0]] = prompt
        options = {  # a loop over np.arange gives NumPy's numbers, which JSON does not know
            name: value.item() if isinstance(value, np.generic) else value
            for name, value in options.items()
        }
        for name, value in options.items():
            _check_text(name, value)
        settle = getattr(self.family, "settle", None)
        if settle is not None:
            options = settle(self, options)
        return kind(**options)

    def or_example(self, prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the prompt in its field, or with the family's example input."""
        inputs = self.family.INPUTS
        if prompt is not None and inputs:
            return {**options, inputs[0]: prompt}
        given = any(name in options for name in inputs)
        return dict(options) if given else {**self.family.EXAMPLE, **options}

    def stream(self, prompt: Any = None, /, **options: Any) -> Stream:
        """Generate step by step; options as the family's `Request` documents them.

        Raises RequestError also when a budget that refuses is used up.
        """
        return self._stream(self.request(prompt, **options))

    def generate(self, prompt: Any = None, /, **options: Any) -> Result:
        """Generate to the end."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def repeat(self, repeats: int, prompt: Any = None, /, **options: Any) -> Result:
        """Generate `repeats` times in one window that begins on a tick: one receipt over all.

        For generations that are short against the meter's tick; `meters.plan_repeats` says how
        many a wanted uncertainty takes. The output is the last one.
        """
        if repeats < 1:
            raise RequestError(f"repeats is {repeats}, expected 1 or more")
        request = self.request(prompt, **options)
        stream = self._stream(request, repeats=repeats, aligned=True)
        for _ in stream:
            pass
        return stream.result

    def _stream(self, request: Any, *, repeats: int = 1, aligned: bool = False) -> Stream:
        if self.guard is not None:
            self.guard.before(self.tag)
        return Stream(self, request, repeats=repeats, aligned=aligned)

    def share_meters(self, selection: meters.Selection, baseline: energy.Baseline | None) -> None:
        """Take the meters, and the idle power, that all engines of this process share."""
        self.selection = selection
        self._baseline = baseline
        self._baseline_s = 0.0

    def baseline(self) -> energy.Baseline | None:
        """Idle power with this model loaded: measured once, after the first generation.

        An estimate brings its own. None where it was not asked for (`baseline_s=0`) or no meter
        can tell within `LONGEST_BASELINE_S`: a battery's firmware would take minutes.
        """
        if self._baseline is None:
            self._baseline = self.selection.baseline
            seconds = max(self._baseline_s, meters.least_seconds(self.selection))
            patience_s = max(self._baseline_s, LONGEST_BASELINE_S)
            if self._baseline is None and self._baseline_s > 0 and seconds <= patience_s:
                self._baseline = meters.measure_baseline(self.selection, seconds)
        return self._baseline

    def _cpu_times(self) -> attribution.CpuTimes | None:
        """For this process's share: of sensors of the CPU; an estimate is of this process alone."""
        if self.selection.source not in ("measured", "integrated"):
            return None
        if any(scope.startswith("gpu") for scope in self.selection.scope):
            return None
        return attribution.cpu_times()

    def keep(self, receipt: Receipt) -> Ticket | None:
        """Put a receipt on the account: the ledger, the budgets, whoever wants to be told."""
        ticket = None if self.ledger is None else self.ledger.append(receipt)
        if self.guard is not None:
            self.guard.after(receipt)
        for tell in self.on_receipt:
            tell(receipt)
        return ticket

    def receipt(self, request: Any, output: Output | None, measured: Measured) -> Receipt:
        """What the generation of `output` cost; None for one that was ended early."""
        return receipt_of(
            measured,
            session=self.session,
            request=request,
            output=output,
            unit=self.family.UNIT,
            selection=self.selection,
            baseline=self.baseline(),
            footprint=self.footprint,
            tag=self.tag,
        )
