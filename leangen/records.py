"""What passes between the parts: readings, energies, steps, outputs and the receipt.

Frozen dataclasses of the standard library only, so that a ledger can be read on a machine that has
no ONNX Runtime. Energies are integer microjoules inside, so that shares add up exactly; joules
appear at the edge (`gross_j`, the JSON form).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

RECEIPT_SCHEMA = "leangen.receipt/1"

Source = Literal["measured", "integrated", "estimated", "unavailable"]
"""How an energy was got: a counter, power samples summed, a model, or not at all."""

Media = Literal["text", "audio", "image", "table"]
"""What an output is, and so how it can be saved."""

COVERAGE_FACTOR = 2.0
"""k of every stated uncertainty u: value ± u holds the truth in about 95% of windows."""


def joules(energy_uj: int | None) -> float | None:
    """Microjoules as joules; None stays None.

    >>> joules(4_100_000), joules(None)
    (4.1, None)
    """
    return None if energy_uj is None else energy_uj / 1e6


@dataclass(frozen=True, slots=True)
class Reading:
    """One look at a cumulative counter."""

    count: int
    """The sensor's native integer."""
    unit: str
    """What one count is: `uJ` (RAPL, estimate) or `mJ` (NVML)."""
    t_ns: int
    """Monotonic clock, at the moment of the read."""


@dataclass(frozen=True, slots=True, kw_only=True)
class MeterWindow:
    """What one sensor says of one interval."""

    sensor: str
    """For example `rapl:package-0`, `nvml:0`, `estimate:cpu-time`."""
    source: Source
    energy_uj: int | None
    """None when a fault left no figure; then `faults` says which."""
    u_random_j: float | None = None
    """Random part of the uncertainty at k=2: edges, jitter, sampling. Adds in quadrature."""
    u_systematic_j: float | None = None
    """Systematic part at k=2: the sensor's class, the model's. Adds linearly."""
    tick_s: float | None = None
    """How often the counter moves; an interval shorter than this cannot be resolved."""
    coverage: float | None = None
    """Share of the interval that the sensor really looked at."""
    faults: tuple[str, ...] = ()
    terms: Mapping[str, float] = field(default_factory=dict)
    """What the uncertainty is made of, joules at k=2: see `leangen.meters.uncertainty`."""

    def to_json(self) -> dict[str, Any]:
        """The receipt's entry in `energy.meters`."""
        return {
            "sensor": self.sensor,
            "source": self.source,
            "joules": joules(self.energy_uj),
            "u_random_j": self.u_random_j,
            "u_systematic_j": self.u_systematic_j,
            "tick_s": self.tick_s,
            "coverage": self.coverage,
            "faults": list(self.faults),
            "terms": dict(self.terms),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class StepEnergy:
    """The energy of all steps of one kind within a generation."""

    kind: str
    energy_uj: int
    u_j: float
    method: Literal["measured", "shared"]
    """`shared`: below the tick, so a share by duration of the measured total."""
    each_uj: tuple[int, ...] = ()
    """Of each step in order, when they are few: each denoising step, each flow pass."""
    each_method: Literal["measured", "shared"] = "shared"

    def to_json(self) -> dict[str, Any]:
        """The receipt's entry in `energy.steps`."""
        return {
            "kind": self.kind,
            "joules": joules(self.energy_uj),
            "u_j": self.u_j,
            "method": self.method,
            "each_j": [joules(uj) for uj in self.each_uj],
            "each_method": self.each_method,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Energy:
    """What a generation cost, and how well that is known (k = 2 throughout)."""

    source: Source
    scope: tuple[str, ...]
    """The disjoint domains that the total covers."""
    reason: str | None
    """Why the figure is what it is: why unavailable, why only estimated."""
    gross_uj: int | None
    """Everything the scope used during the window."""
    u_random_j: float | None = None
    u_systematic_j: float | None = None
    u_j: float | None = None
    idle_uj: int | None = None
    """What the scope would have used in the same time with the model loaded and idle."""
    idle_u_j: float | None = None
    marginal_uj: int | None = None
    """gross - idle; negative when the baseline was busier, and shown so."""
    marginal_u_j: float | None = None
    per_unit_j: float | None = None
    """Gross joules per unit of work."""
    per_unit_u_j: float | None = None
    meters: tuple[MeterWindow, ...] = ()
    steps: tuple[StepEnergy, ...] = ()
    baseline: Mapping[str, Any] | None = None
    """The idle power behind `idle_uj`, with its spread; None with no idle figure."""
    attribution: Mapping[str, Any] | None = None
    """This process's share of the marginal on a machine that others use too; not measured."""

    @property
    def gross_j(self) -> float | None:
        """Gross energy in joules."""
        return joules(self.gross_uj)

    @property
    def idle_j(self) -> float | None:
        """Idle energy of the same duration in joules."""
        return joules(self.idle_uj)

    @property
    def marginal_j(self) -> float | None:
        """Gross minus idle, in joules."""
        return joules(self.marginal_uj)

    @property
    def tick_s(self) -> float | None:
        """The slowest tick among the meters of the total: the resolution of the figure."""
        return max((m.tick_s for m in self.meters if m.tick_s is not None), default=None)

    def to_json(self) -> dict[str, Any]:
        """The receipt's `energy`."""
        return {
            "source": self.source,
            "scope": list(self.scope),
            "reason": self.reason,
            "k": COVERAGE_FACTOR,
            "gross_j": self.gross_j,
            "u_random_j": self.u_random_j,
            "u_systematic_j": self.u_systematic_j,
            "u_j": self.u_j,
            "idle_j": self.idle_j,
            "idle_u_j": self.idle_u_j,
            "marginal_j": self.marginal_j,
            "marginal_u_j": self.marginal_u_j,
            "per_unit_j": self.per_unit_j,
            "per_unit_u_j": self.per_unit_u_j,
            "tick_s": self.tick_s,
            "meters": [m.to_json() for m in self.meters],
            "steps": [s.to_json() for s in self.steps],
            "baseline": None if self.baseline is None else dict(self.baseline),
            "attribution": None if self.attribution is None else dict(self.attribution),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Latency:
    """Durations of one generation in seconds."""

    total_s: float
    ttft_s: float | None
    """From the request to the end of the first step that finished a unit of work."""
    step_p50_s: float | None
    """Median over the steps after the first unit (all steps when there is only one kind)."""
    step_p95_s: float | None

    def to_json(self) -> dict[str, Any]:
        """The receipt's `latency`."""
        return {
            "total_s": self.total_s,
            "ttft_s": self.ttft_s,
            "step_p50_s": self.step_p50_s,
            "step_p95_s": self.step_p95_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Units:
    """How much work a generation did, in the family's own unit."""

    kind: str
    count: float
    prompt: float = 0
    """Units of input: prompt tokens, phonemes."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """Sums of the steps' counts, by name: see `Step.counts`."""

    def to_json(self) -> dict[str, Any]:
        """The receipt's `units`."""
        return {"kind": self.kind, "count": self.count, "prompt": self.prompt, **self.counts}


@dataclass(frozen=True, slots=True, kw_only=True)
class Embodied:
    """The emissions of making the hardware, spread evenly over the time that it is used."""

    total_kg: float
    lifetime_years: float
    g_per_s: float

    def to_json(self) -> dict[str, Any]:
        """The receipt's `carbon.embodied`."""
        return {
            "total_kg": self.total_kg,
            "lifetime_years": self.lifetime_years,
            "g_per_s": self.g_per_s,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Carbon:
    """Emissions of one generation: operational, and the hardware's share where it is known."""

    g: float | None
    """Operational gCO2e; None when the energy or the intensity is unavailable."""
    intensity_g_per_kwh: float | None
    region: str
    year: int | None
    source: str
    u_g: float | None = None
    """The energy's uncertainty in gCO2e (k = 2); the intensity is taken as given."""
    reason: str | None = None
    """Why `g` is None."""
    embodied: Embodied | None = None
    embodied_g: float | None = None
    """The hardware's share by duration, in gCO2e; not part of `g`."""
    sci_g_per_unit: float | None = None
    """Software carbon intensity (ISO/IEC 21031), (g + embodied_g) per unit of work; None where the
    embodied share is not given."""
    sci_u_g_per_unit: float | None = None

    def to_json(self) -> dict[str, Any]:
        """The receipt's `carbon`."""
        return {
            "g": self.g,
            "intensity_g_per_kwh": self.intensity_g_per_kwh,
            "region": self.region,
            "year": self.year,
            "source": self.source,
            "u_g": self.u_g,
            "reason": self.reason,
            "embodied": None if self.embodied is None else self.embodied.to_json(),
            "embodied_g": self.embodied_g,
            "sci_g_per_unit": self.sci_g_per_unit,
            "sci_u_g_per_unit": self.sci_u_g_per_unit,
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Runtime:
    """What ran the graphs, and why that."""

    provider: str
    threads: int
    kernels: str
    reasons: Mapping[str, str] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    def to_json(self) -> dict[str, Any]:
        """The receipt's `runtime`."""
        return {
            "provider": self.provider,
            "threads": self.threads,
            "kernels": self.kernels,
            "reasons": dict(self.reasons),
            "versions": dict(self.versions),
        }


@dataclass(frozen=True, slots=True, kw_only=True)
class Host:
    """The machine, as far as a ledger needs to tell machines and boots apart."""

    id: str
    boot_id: str
    device: str

    def to_json(self) -> dict[str, Any]:
        """The receipt's `host`."""
        return {"id": self.id, "boot_id": self.boot_id, "device": self.device}


@dataclass(frozen=True, slots=True, kw_only=True)
class Receipt:
    """What one generation cost. `to_json` is the documented, versioned form."""

    id: str
    started_at: str
    duration_ns: int
    host: Host
    model: str
    scheme: str
    bundle: str
    family: str
    request: Mapping[str, Any]
    units: Units
    energy: Energy
    latency: Latency
    carbon: Carbon
    peak_rss_bytes: int
    runtime: Runtime
    tag: str | None = None
    begin_boottime_ns: int | None = None
    """When the measured window began, since boot: tells which windows of one machine overlap."""
    parts: tuple[Receipt, ...] = ()
    """Of a pipeline: the receipts of its parts, whose energies add up to this one's exactly."""

    def to_json(self) -> dict[str, Any]:
        """The receipt as plain JSON types, schema `leangen.receipt/1`."""
        document = {
            "schema": RECEIPT_SCHEMA,
            "id": self.id,
            "started_at": self.started_at,
            "duration_ns": self.duration_ns,
            "begin_boottime_ns": self.begin_boottime_ns,
            "tag": self.tag,
            "host": self.host.to_json(),
            "model": self.model,
            "scheme": self.scheme,
            "bundle": self.bundle,
            "family": self.family,
            "request": dict(self.request),
            "units": self.units.to_json(),
            "energy": self.energy.to_json(),
            "latency": self.latency.to_json(),
            "carbon": self.carbon.to_json(),
            "memory": {"peak_rss_bytes": self.peak_rss_bytes},
            "runtime": self.runtime.to_json(),
        }
        return document | ({"parts": [part.to_json() for part in self.parts]} if self.parts else {})


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One unit of progress, yielded by a family the moment it is done."""

    kind: str
    """`prefill`, `decode`, `encode`, `denoise`, `flow`, ..."""
    units: float
    """Units of work that this step finished (tokens, pixels, seconds of audio); may be 0."""
    text: str = ""
    """Text that became printable with this step (language)."""
    tokens: Sequence[int] = ()
    """The tokens that this step produced (language); several where guesses came true."""
    sample: int = 0
    """Which of the samples that were asked for it continues."""
    logprobs: Sequence[Mapping[str, Any]] = ()
    """Of `tokens`, where they were asked for of a batch: as in its output's `extra["logprobs"]`."""
    picture: Any = None
    """What there is of an image so far, [height, width, channels] (diffusion in pixels)."""
    counts: Mapping[str, int] = field(default_factory=dict)
    """What only one family counts, by name; the receipt sums them. Language: prompt tokens
    `reused` from the sequence before, next tokens `guessed`, and guesses `accepted`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Output:
    """What a family hands back when it is done; which fields are set depends on the family."""

    prompt_units: float = 0
    text: str | None = None
    tokens: Sequence[int] | None = None
    array: Any = None
    """NumPy array: audio `[samples]`, images `[n, height, width, channels]`, rows `[n, d]`."""
    media: Media = "text"
    sample_rate_hz: int | None = None
    stop_reason: str | None = None
    """Language: `eos`, `stop`, `length`."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """What only one family has, such as the phoneme durations of speech."""
