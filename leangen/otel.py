"""Receipts as OpenTelemetry spans and metrics, by the conventions for generative AI and hardware.

    from leangen import otel
    m = lg.load("smollm2-135m:int4")
    m.on_receipt.append(otel.record)

Each generation becomes one span `text_completion smollm2-135m:int4` with the `gen_ai.*` attributes
and, under `leangen.*`, what no convention names: joules with their u and source, grams, scheme.
Metrics:

    gen_ai.client.operation.duration  s         histogram
    gen_ai.client.token.usage         {token}   histogram, by gen_ai.token.type
    hw.energy, hw.host.energy         J         by hw.id and hw.type; only what a sensor saw
    leangen.energy                    J         gross, by leangen.source
    leangen.emissions                 g         operational CO2e, by leangen.source

An estimate is never in `hw.energy`, which dashboards add up. Neither prompt nor output leaves the
program. Where to is the application's OpenTelemetry configuration; `export` is one for a program
that has none, such as `leangen serve`. The packages are the extra `otel`, and are not imported
before they are used.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import datetime
from functools import lru_cache
from typing import TYPE_CHECKING, Any

from leangen.errors import DependencyError, needs
from leangen.records import Receipt

if TYPE_CHECKING:
    from opentelemetry.metrics import MeterProvider
    from opentelemetry.trace import TracerProvider

PROVIDER = "leangen"
_MISSING = "OpenTelemetry is not installed: pip install 'leangen[otel]'"
DURATION_BUCKETS_S = [0.01 * 2**n for n in range(14)]
TOKEN_BUCKETS = [4**n for n in range(14)]
"""The boundaries that the conventions advise."""

_OUTPUT_TYPES = {"token": "text", "audio-second": "speech", "image": "image"}
_REQUEST = {
    "max_new_tokens": "gen_ai.request.max_tokens",
    "temperature": "gen_ai.request.temperature",
    "top_k": "gen_ai.request.top_k",
    "top_p": "gen_ai.request.top_p",
    "seed": "gen_ai.request.seed",
    "stop": "gen_ai.request.stop_sequences",
}
_WHOLE_HOST = ("rapl:psys", "perf:psys", "external:", "battery:")
"""Sensors of the entire machine: the conventions keep these out of `hw.energy`."""
_HARDWARE = (("gpu", "gpu"), ("nvml", "gpu"), ("dram", "memory"), ("rapl", "cpu"), ("perf", "cpu"))
"""What a sensor's name tells of `hw.type`, the first that fits; else it is a supply rail."""


def operation(family: str) -> str:
    """`gen_ai.operation.name` of a family."""
    names = {"language": "text_completion", "embedding": "embeddings"}
    return names.get(family, "generate_content")


def hardware_type(sensor: str) -> str:
    """`hw.type` of a sensor.

    >>> hardware_type("rapl:package-0"), hardware_type("nvml:0"), hardware_type("rapl:dram-0")
    ('cpu', 'gpu', 'memory')
    """
    name = sensor.lower()
    return next((kind for mark, kind in _HARDWARE if mark in name), "power_supply")


class Telemetry:
    """Records receipts with given providers; None is the application's global one."""

    def __init__(
        self,
        tracer_provider: TracerProvider | None = None,
        meter_provider: MeterProvider | None = None,
    ) -> None:
        """Raises DependencyError without the extra `otel`."""
        trace, metrics = _api()
        from leangen import __version__

        self._internal = trace.SpanKind.INTERNAL
        self._tracer = trace.get_tracer("leangen", __version__, tracer_provider)
        meter = metrics.get_meter("leangen", __version__, meter_provider)
        self._duration = meter.create_histogram(
            "gen_ai.client.operation.duration",
            "s",
            "GenAI operation duration.",
            explicit_bucket_boundaries_advisory=DURATION_BUCKETS_S,
        )
        self._tokens = meter.create_histogram(
            "gen_ai.client.token.usage",
            "{token}",
            "Number of input and output tokens used.",
            explicit_bucket_boundaries_advisory=TOKEN_BUCKETS,
        )
        self._hardware = meter.create_counter(
            "hw.energy", "J", "Energy consumed by the component while generating."
        )
        self._host = meter.create_counter(
            "hw.host.energy", "J", "Energy consumed by the entire host while generating."
        )
        self._energy = meter.create_counter(
            "leangen.energy", "J", "Gross energy of generations, by how it was got."
        )
        self._emissions = meter.create_counter(
            "leangen.emissions", "g", "Operational CO2e of generations."
        )

    def record(self, receipt: Receipt) -> None:
        """Emit the span and the metrics of one generation."""
        started = datetime.fromisoformat(receipt.started_at)
        start_ns = round(started.timestamp() * 1000) * 1_000_000
        span = self._tracer.start_span(
            f"{operation(receipt.family)} {_model(receipt)}",
            kind=self._internal,
            attributes=dict(attributes(receipt)),
            start_time=start_ns,
        )
        span.end(start_ns + receipt.duration_ns)
        common = _common(receipt)
        self._duration.record(receipt.latency.total_s, common)
        if receipt.units.kind == "token":
            for kind, count in (("input", receipt.units.prompt), ("output", receipt.units.count)):
                self._tokens.record(int(count), common | {"gen_ai.token.type": kind})
        sourced = common | {"leangen.source": receipt.energy.source}
        if receipt.energy.gross_j is not None:
            self._energy.add(receipt.energy.gross_j, sourced)
        if receipt.carbon.g is not None:
            self._emissions.add(receipt.carbon.g, sourced)
        for meter in receipt.energy.meters:
            if meter.energy_uj is None or meter.source == "estimated":
                continue
            if meter.sensor.startswith(_WHOLE_HOST):
                self._host.add(meter.energy_uj / 1e6, {"hw.id": meter.sensor})
            else:
                kind = hardware_type(meter.sensor)
                self._hardware.add(meter.energy_uj / 1e6, {"hw.id": meter.sensor, "hw.type": kind})


@lru_cache(maxsize=1)
def _global() -> Telemetry:
    return Telemetry()


def record(receipt: Receipt) -> None:
    """Emit one generation through the application's global providers: an `on_receipt` hook.

    Raises DependencyError without the extra `otel`.
    """
    _global().record(receipt)


def export() -> None:
    """Send spans and metrics by OTLP over HTTP, where the program has not said where they go.

    The address is OTEL_EXPORTER_OTLP_ENDPOINT, else this machine's port 4318; the other variables
    of OpenTelemetry hold as well. What is left is sent when the program ends. Raises
    DependencyError without the extra `otel`.
    """
    trace, metrics = _api()
    try:
        from opentelemetry.exporter.otlp.proto.http.metric_exporter import OTLPMetricExporter
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.metrics import MeterProvider
        from opentelemetry.sdk.metrics.export import PeriodicExportingMetricReader
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ModuleNotFoundError as error:
        if not (error.name or "").startswith("opentelemetry"):
            raise
        raise DependencyError(_MISSING) from error
    if isinstance(trace.get_tracer_provider(), TracerProvider):
        return
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: PROVIDER}))
    tracers = TracerProvider(resource=resource)
    tracers.add_span_processor(BatchSpanProcessor(OTLPSpanExporter()))
    trace.set_tracer_provider(tracers)
    reader = PeriodicExportingMetricReader(OTLPMetricExporter())
    metrics.set_meter_provider(MeterProvider(resource=resource, metric_readers=[reader]))


def caller(headers: Mapping[str, str]) -> Any:
    """The context of a request: the span that is open here, else the one that its headers name.

    Headers as of W3C Trace Context. A web framework may have opened a span for the request.
    """
    from opentelemetry import context, trace
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if trace.get_current_span().get_span_context().is_valid:
        return context.get_current()
    return TraceContextTextMapPropagator().extract(headers)


@contextmanager
def within(caller: Any) -> Iterator[None]:
    """What is recorded here belongs to the trace of a `caller`."""
    from opentelemetry import context

    token = context.attach(caller)
    try:
        yield
    finally:
        context.detach(token)


def attributes(receipt: Receipt) -> Iterator[tuple[str, Any]]:
    """The attributes of a receipt's span; what is unknown is left out."""
    energy, latency, carbon, units = receipt.energy, receipt.latency, receipt.carbon, receipt.units
    found: dict[str, Any] = {
        **_common(receipt),
        "gen_ai.response.model": _model(receipt),
        "gen_ai.response.id": receipt.id,
        "gen_ai.response.time_to_first_chunk": latency.ttft_s,
        "gen_ai.output.type": _OUTPUT_TYPES.get(units.kind),
        "leangen.scheme": receipt.scheme,
        "leangen.family": receipt.family,
        "leangen.bundle": receipt.bundle,
        "leangen.tag": receipt.tag,
        "leangen.unit": units.kind,
        "leangen.units": units.count,
        "leangen.source": energy.source,
        "leangen.reason": energy.reason,
        "leangen.energy.gross_j": energy.gross_j,
        "leangen.energy.u_j": energy.u_j,
        "leangen.energy.idle_j": energy.idle_j,
        "leangen.energy.marginal_j": energy.marginal_j,
        "leangen.energy.per_unit_j": energy.per_unit_j,
        "leangen.carbon.g": carbon.g,
        "leangen.carbon.embodied_g": carbon.embodied_g,
        "leangen.carbon.sci_g_per_unit": carbon.sci_g_per_unit,
        "leangen.carbon.region": carbon.region,
    }
    if units.kind == "token":
        found["gen_ai.usage.input_tokens"] = int(units.prompt)
        found["gen_ai.usage.output_tokens"] = int(units.count)
    for name, attribute in _REQUEST.items():
        found[attribute] = receipt.request.get(name)
    for name, value in found.items():
        if value is not None and value != []:
            yield name, value


def _common(receipt: Receipt) -> dict[str, Any]:
    return {
        "gen_ai.operation.name": operation(receipt.family),
        "gen_ai.provider.name": PROVIDER,
        "gen_ai.request.model": _model(receipt),
    }


def _model(receipt: Receipt) -> str:
    return f"{receipt.model}:{receipt.scheme}"


def _api() -> tuple[Any, Any]:
    names = "opentelemetry", "opentelemetry.metrics", "opentelemetry.trace"
    with needs(*names, message=_MISSING):
        from opentelemetry import metrics, trace
    return trace, metrics
