"""A loaded pipeline: its parts run one after the other inside one measured window."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Callable, Generator, Iterator, Mapping
from typing import Any

from leangen import clock, energy, meters
from leangen.engine import Result, close_at_exit
from leangen.errors import LeangenError, RequestError
from leangen.ledger import Ticket
from leangen.pipeline import accounts, ports, template
from leangen.pipeline.accounts import Leg
from leangen.pipeline.atoms import Runner
from leangen.pipeline.fitting import check
from leangen.pipeline.spec import Spec
from leangen.pipeline.template import INPUT, Reference
from leangen.records import Media, Output, Receipt, Step


@dataclasses.dataclass(frozen=True, slots=True)
class PipelineResult(Result):
    """The last part's output, the receipt of the whole, and every part's own result."""

    parts: Mapping[str, Result] = dataclasses.field(default_factory=dict)


class Pipeline:
    """Parts that are known to fit together; generates like a model does.

    Raises RequestError where what one part gives is not what the next takes.
    """

    def __init__(self, spec: Spec, atoms: Mapping[str, Runner]) -> None:
        self.spec = spec
        self.atoms = atoms
        check(spec, atoms)
        self._last = list(atoms.values())[-1]
        self.selection = self._last.engine.selection

    @property
    def name(self) -> str:
        """The file's name without .toml; what an output is called by default."""
        return self.spec.name

    @property
    def media(self) -> Media:
        """What the last part makes."""
        return self._last.media

    @property
    def digest(self) -> str:
        """`sha256:` of what is written and of the bundles that it names."""
        told = [repr(self.spec), *(atom.engine.bundle.digest for atom in self.atoms.values())]
        return "sha256:" + hashlib.sha256("\0".join(told).encode()).hexdigest()

    def stream(self, prompt: Any = None, /, **inputs: Any) -> PipelineStream:
        """Run the parts, step by step; `prompt` is the first input, others go by name.

        Raises RequestError for an input that there is not, and for one that is missing.
        """
        given = self._inputs(prompt, inputs)
        guard = self._last.engine.guard
        if guard is not None:
            guard.before(self._last.engine.tag)
        return PipelineStream(self, given)

    def generate(self, prompt: Any = None, /, **inputs: Any) -> PipelineResult:
        """Run the parts to the end."""
        stream = self.stream(prompt, **inputs)
        for _ in stream:
            pass
        return stream.result

    def baseline(self) -> energy.Baseline | None:
        """Idle power with all parts loaded: measured once, shared by them all."""
        baseline = self._last.engine.baseline()
        for atom in self.atoms.values():
            atom.engine.share_meters(self.selection, baseline)
        return baseline

    def values(
        self, inputs: Mapping[str, Any], done: Mapping[str, Output]
    ) -> Callable[[Reference], Any]:
        """What a reference stands for, once the parts that it may name have run."""

        def value(reference: Reference) -> Any:
            if reference.part == INPUT:
                return inputs[reference.output]
            port = self.atoms[reference.part].ports.gives[reference.output]
            found = ports.value(done[reference.part], reference.output)
            return template.apply(reference.filters, found, port)

        return value

    def _inputs(self, prompt: Any, given: Mapping[str, Any]) -> dict[str, Any]:
        known = self.spec.inputs
        if prompt is not None:
            if not known:
                raise RequestError(f"{self.name} takes no prompt: it has no inputs")
            given = {next(iter(known)): prompt, **given}
        for name in given:
            if name not in known:
                raise RequestError(
                    f"{self.name} takes no input {name!r}: it takes {', '.join(known) or 'none'}; "
                    "what its parts are asked for stands in its file"
                )
        inputs = {name: entry.default for name, entry in known.items()} | dict(given)
        for name, value in inputs.items():
            if value is None:
                about = known[name].about
                raise RequestError(
                    f"{self.name} needs the input {name!r}" + (f": {about}" if about else "")
                )
        return inputs


class PipelineStream(Iterator[Step]):
    """The steps of one run, each kind with its part's name before it; `result` at the end.

    Closing it early (or an error inside it) still accounts for what was spent.
    """

    def __init__(self, pipeline: Pipeline, inputs: Mapping[str, Any]) -> None:
        self.receipt: Receipt | None = None
        self._legs: list[Leg] = []
        self._tickets: list[Ticket | None] = []
        self._steps = self._run(pipeline, inputs)
        close_at_exit(self)

    def __iter__(self) -> Iterator[Step]:
        return self

    def __next__(self) -> Step:
        return next(self._steps)

    def close(self) -> None:
        """Stop; the energy spent so far is accounted for."""
        self._steps.close()

    @property
    def result(self) -> PipelineResult:
        """The last output and all receipts, which are then on the disk if there is a ledger."""
        made = self.made
        for ticket in self._tickets:
            if ticket is not None:
                ticket.wait()
        return made

    @property
    def made(self) -> PipelineResult:
        """The last output and all receipts, whether the ledger takes them or not."""
        last = self._legs[-1].output if self._legs else None
        if last is None or self.receipt is None:
            raise RequestError(
                "the stream is not finished: take all its steps, then ask for result"
            )
        parts = {
            leg.name: Result(leg.output, receipt)
            for leg, receipt in zip(self._legs, self.receipt.parts, strict=True)
            if leg.output is not None
        }
        return PipelineResult(last, self.receipt, parts)

    def _run(self, pipeline: Pipeline, inputs: Mapping[str, Any]) -> Generator[Step]:
        marks: dict[int, int] = {}
        done: dict[str, Output] = {}
        count, talker = 0, ""
        started_at = clock.utc_now()
        window = meters.begin(pipeline.selection)
        begin_ns = clock.monotonic_ns()
        try:
            for part in pipeline.spec.parts:
                atom = pipeline.atoms[part.name]
                options = template.fill(part.request, pipeline.values(inputs, done))
                since_ns = clock.monotonic_ns() - begin_ns
                leg = Leg(part.name, atom.engine, atom.request(options), clock.utc_now(), since_ns)
                self._legs.append(leg)
                running = atom.run(leg.request)
                try:
                    while True:
                        step_ns = clock.monotonic_ns()
                        try:
                            step = next(running)
                        except StopIteration as stop:
                            leg.output = done[part.name] = stop.value
                            break
                        leg.steps.append((step.kind, step.units, clock.monotonic_ns() - step_ns))
                        leg.counts.update(step.counts)
                        if meters.keep_up(window) and (spent_uj := window.energy_uj) is not None:
                            marks[count] = spent_uj
                        count += 1
                        # The parts' texts stand one below the other.
                        between = "\n" if step.text and talker not in ("", part.name) else ""
                        talker = part.name if step.text else talker
                        yield dataclasses.replace(
                            step, kind=f"{part.name}/{step.kind}", text=between + step.text
                        )
                finally:
                    running.close()
        except LeangenError as error:
            raise type(error)(f"{pipeline.name}: parts.{part.name}: {error}") from error
        finally:
            duration_ns = clock.monotonic_ns() - begin_ns
            windows = meters.end(window)
            self._legs = [leg for leg in self._legs if leg.steps]
            run = accounts.Run(
                legs=self._legs,
                started_at=started_at,
                begin_boottime_ns=window.begin_boottime_ns,
                duration_ns=duration_ns,
                windows=windows,
                marks=marks,
            )
            if run.legs:
                self._keep(pipeline, run, inputs)

    def _keep(self, pipeline: Pipeline, run: accounts.Run, inputs: Mapping[str, Any]) -> None:
        """Make the receipts of a run and put those of its parts on the account."""
        self.receipt = accounts.settle(
            run,
            name=pipeline.name,
            digest=pipeline.digest,
            request=_described(inputs),
            selection=pipeline.selection,
            baseline=pipeline.baseline(),
        )
        self._tickets = [
            leg.engine.keep(part) for leg, part in zip(run.legs, self.receipt.parts, strict=True)
        ]


def _described(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """The inputs for the receipt: numbers as they are, of texts and files only that they are."""
    return {
        name: value if isinstance(value, int | float) else "given" for name, value in inputs.items()
    }
