"""The one place where running meets measuring.

A family yields steps; the engine times each, reads the meters at the two edges of the generation,
and hands back the output with its receipt. It never asks which family it runs.
"""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from leangen import carbon, clock, energy, families, host, media, meters
from leangen.budget import Guard
from leangen.bundle import Bundle
from leangen.errors import RequestError
from leangen.ledger import Ledger, Ticket
from leangen.records import Latency, MeterWindow, Output, Receipt, Runtime, Step, Units
from leangen.session import Session

BASELINE_S = 1.0


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
    def array(self) -> np.ndarray[Any, Any] | None:
        """Audio `[samples]`, images `[n, height, width, channels]` or rows `[n, d]`."""
        return None if self.output.array is None else np.asarray(self.output.array)

    def save(self, path: str | Path) -> Path:
        """Write the output by the suffix of `path`: .txt, .wav, .png, .csv, .npy.

        Raises RequestError when this output has no such form.
        """
        return media.save(self.output, Path(path))


class Stream(Iterator[Step]):
    """The steps of one generation as they are done; `result` once they are all taken.

    Closing it early (or an exception inside it) still accounts for what was spent: the receipt
    goes to the ledger and to `receipt`.
    """

    def __init__(self, engine: Engine, request: Any) -> None:
        self.receipt: Receipt | None = None
        self._ticket: Ticket | None = None
        self._output: Output | None = None
        self._steps = self._run(engine, request)

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
        if self._output is None or self.receipt is None:
            raise RequestError(
                "the stream is not finished: take all its steps, then ask for result"
            )
        if self._ticket is not None:
            self._ticket.wait()
        return Result(self._output, self.receipt)

    def _run(self, engine: Engine, request: Any) -> Generator[Step]:
        steps: list[tuple[str, float, int]] = []
        started_at = clock.utc_now()
        window = meters.begin(engine.selection)
        begin_ns = clock.monotonic_ns()
        running = engine.family.run(engine.session, request)
        try:
            while True:
                step_ns = clock.monotonic_ns()
                try:
                    step = next(running)
                except StopIteration as stop:
                    self._output = stop.value
                    return
                steps.append((step.kind, step.units, clock.monotonic_ns() - step_ns))
                meters.keep_up(window)
                yield step
        finally:
            running.close()
            duration_ns = clock.monotonic_ns() - begin_ns
            windows = meters.end(window)
            if steps:
                self.receipt = engine._receipt(
                    request, self._output, steps, started_at, window, duration_ns, windows
                )
                if engine.ledger is not None:
                    self._ticket = engine.ledger.append(self.receipt)
                if engine.guard is not None:
                    engine.guard.after(self.receipt)
                for tell in engine.on_receipt:
                    tell(self.receipt)


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
        root: Path = Path("/"),
    ) -> None:
        self.session = session
        self.family = families.of(session.bundle)
        self.ledger = ledger
        self.footprint = footprint or carbon.footprint()
        self.tag = tag
        self.guard = guard
        self.on_receipt: list[Callable[[Receipt], None]] = []
        """Called with each receipt after it went to the ledger, in the thread that generates."""
        self.selection = meters.select(root)
        self._baseline_s = baseline_s
        self._baseline: energy.Baseline | None = None
        self.family.prepare(session)

    @property
    def bundle(self) -> Bundle:
        """The bundle that runs."""
        return self.session.bundle

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
        return kind(**options)

    def or_example(self, prompt: Any, options: Mapping[str, Any]) -> dict[str, Any]:
        """The options with the prompt in its field, or with the family's example input."""
        inputs = self.family.INPUTS
        if prompt is not None and inputs:
            return {**options, inputs[0]: prompt}
        return (
            dict(options)
            if any(name in options for name in inputs)
            else {
                **self.family.EXAMPLE,
                **options,
            }
        )

    def stream(self, prompt: Any = None, /, **options: Any) -> Stream:
        """Generate step by step; options as the family's `Request` documents them.

        Raises RequestError also when a budget that refuses is used up.
        """
        request = self.request(prompt, **options)
        if self.guard is not None:
            self.guard.before(self.tag)
        return Stream(self, request)

    def generate(self, prompt: Any = None, /, **options: Any) -> Result:
        """Generate to the end."""
        stream = self.stream(prompt, **options)
        for _ in stream:
            pass
        return stream.result

    def baseline(self) -> energy.Baseline | None:
        """Idle power with this model loaded: measured once, after the first generation.

        An estimate brings its own. None where it was not asked for (`baseline_s=0`) or no meter
        can tell.
        """
        if self._baseline is None:
            self._baseline = self.selection.baseline
            if self._baseline is None and self._baseline_s > 0:
                self._baseline = meters.measure_baseline(self.selection, self._baseline_s)
        return self._baseline

    def _receipt(
        self,
        request: Any,
        output: Output | None,
        steps: list[tuple[str, float, int]],
        started_at: str,
        window: meters.OpenWindow,
        duration_ns: int,
        windows: Sequence[MeterWindow],
    ) -> Receipt:
        session, bundle = self.session, self.bundle
        count = sum(units for _, units, _ in steps)
        spent = energy.account(
            windows,
            scope=self.selection.scope,
            reason=self.selection.reason,
            duration_ns=duration_ns,
            baseline=self.baseline(),
            units=count,
            steps=[(kind, step_ns) for kind, _, step_ns in steps],
        )
        return Receipt(
            id=uuid.uuid4().hex,
            started_at=started_at,
            duration_ns=duration_ns,
            host=host.host(),
            model=bundle.name,
            scheme=bundle.scheme,
            bundle=bundle.digest,
            family=bundle.family,
            request=request.describe(),
            units=Units(
                kind=self.family.UNIT,
                count=count,
                prompt=output.prompt_units if output is not None else 0,
            ),
            energy=spent,
            latency=_latency(steps, duration_ns),
            carbon=self.footprint.of(
                spent.gross_j,
                spent.u_j,
                started_at=started_at,
                duration_s=duration_ns / 1e9,
                units=count,
            ),
            peak_rss_bytes=host.peak_rss_bytes(),
            runtime=Runtime(
                provider=session.provider,
                threads=session.threads,
                kernels=session.kernels,
                reasons=session.reasons,
                versions=host.versions(),
            ),
            tag=self.tag,
            begin_boottime_ns=window.begin_boottime_ns,
        )


def _latency(steps: Sequence[tuple[str, float, int]], duration_ns: int) -> Latency:
    """Total, time to the first unit, and the spread of the steps after it."""
    done_ns = 0
    ttft_s = None
    first = 0
    for index, (_, units, step_ns) in enumerate(steps):
        done_ns += step_ns
        if units > 0:
            ttft_s = done_ns / 1e9
            first = index
            break
    later = [step_ns for _, _, step_ns in steps[first + 1 :]] or [ns for _, _, ns in steps]
    p50, p95 = np.percentile(later, [50, 95]) / 1e9
    return Latency(
        total_s=duration_ns / 1e9, ttft_s=ttft_s, step_p50_s=float(p50), step_p95_s=float(p95)
    )
