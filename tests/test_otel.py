"""OpenTelemetry: spans and metrics of receipts, by the published conventions."""

from __future__ import annotations

import subprocess
import sys

import pytest
from receipt_fakes import receipt

from leangen import otel
from leangen.records import MeterWindow

pytest.importorskip("opentelemetry.sdk", reason="needs the extra otel")

from opentelemetry.sdk.metrics import MeterProvider
from opentelemetry.sdk.metrics.export import InMemoryMetricReader
from opentelemetry.sdk.trace import TracerProvider
from opentelemetry.sdk.trace.export import SimpleSpanProcessor
from opentelemetry.sdk.trace.export.in_memory_span_exporter import InMemorySpanExporter
from opentelemetry.trace import SpanKind


class Backend:
    """In-memory exporters, and the telemetry that feeds them."""

    def __init__(self):
        self._spans, self._reader = InMemorySpanExporter(), InMemoryMetricReader()
        tracer_provider = TracerProvider()
        tracer_provider.add_span_processor(SimpleSpanProcessor(self._spans))
        meter_provider = MeterProvider(metric_readers=[self._reader])
        self.telemetry = otel.Telemetry(tracer_provider, meter_provider)

    @property
    def spans(self):
        return self._spans.get_finished_spans()

    @property
    def metrics(self):
        data = self._reader.get_metrics_data()
        found = data.resource_metrics[0].scope_metrics[0].metrics
        return {metric.name: metric for metric in found}

    def points(self, name):
        return [
            (dict(point.attributes), getattr(point, "value", getattr(point, "sum", None)))
            for point in self.metrics[name].data.data_points
        ]


@pytest.fixture
def backend():
    return Backend()


def test_a_generation_is_a_span_with_the_genai_attributes(backend):
    backend.telemetry.record(receipt("r1", idle_j=1.2, tag="x"))
    (span,) = backend.spans
    assert span.name == "text_completion smollm2-135m:int4"
    assert span.kind == SpanKind.INTERNAL, "the model runs in this process"
    assert span.end_time - span.start_time == 500_000_000
    assert span.start_time == 1_795_248_000_123_000_000, "2026-11-21T08:00:00.123Z"
    found = dict(span.attributes)
    assert found["gen_ai.operation.name"] == "text_completion"
    assert found["gen_ai.provider.name"] == "leangen"
    assert found["gen_ai.request.model"] == "smollm2-135m:int4"
    assert found["gen_ai.response.id"] == "r1"
    assert found["gen_ai.output.type"] == "text"
    assert (found["gen_ai.usage.input_tokens"], found["gen_ai.usage.output_tokens"]) == (12, 64)
    assert found["gen_ai.request.max_tokens"] == 64
    assert found["gen_ai.request.temperature"] == 0
    assert found["gen_ai.request.stop_sequences"] == (".",)
    assert found["leangen.energy.gross_j"] == 4.1
    assert found["leangen.energy.idle_j"] == 1.2
    assert found["leangen.energy.u_j"] == pytest.approx(0.206, abs=1e-3)
    assert (found["leangen.source"], found["leangen.tag"]) == ("measured", "x")


def test_what_is_unknown_is_absent_not_zero(backend):
    backend.telemetry.record(receipt("r1", gross_j=None))
    found = dict(backend.spans[0].attributes)
    assert found["leangen.source"] == "unavailable"
    assert "why it is unavailable" in found["leangen.reason"]
    assert not any(name.startswith(("leangen.energy", "leangen.carbon.g")) for name in found)
    assert not {"hw.energy", "leangen.energy", "leangen.emissions"} & set(backend.metrics)
    assert "gen_ai.client.operation.duration" in backend.metrics


def test_names_units_and_buckets_are_the_conventions(backend):
    gen_ai = pytest.importorskip("opentelemetry.semconv._incubating.metrics.gen_ai_metrics")
    hardware = pytest.importorskip("opentelemetry.semconv._incubating.metrics.hw_metrics")
    backend.telemetry.record(receipt("r1"))
    backend.telemetry.record(receipt("r2", sensor="external:wall"))
    units = {name: metric.unit for name, metric in backend.metrics.items()}
    assert units == {
        gen_ai.GEN_AI_CLIENT_OPERATION_DURATION: "s",
        gen_ai.GEN_AI_CLIENT_TOKEN_USAGE: "{token}",
        hardware.HW_ENERGY: "J",
        hardware.HW_HOST_ENERGY: "J",
        "leangen.energy": "J",
        "leangen.emissions": "g",
    }
    (point,) = backend.metrics["gen_ai.client.operation.duration"].data.data_points
    assert point.explicit_bounds[:3] == (0.01, 0.02, 0.04)
    assert point.explicit_bounds[-1] == 81.92
    (point, *_) = backend.metrics["gen_ai.client.token.usage"].data.data_points
    assert point.explicit_bounds[-1] == 67_108_864


def test_tokens_are_counted_by_type_and_other_work_is_not_tokens(backend):
    backend.telemetry.record(receipt("r1"))
    backend.telemetry.record(receipt("r2", units=36.0))
    backend.telemetry.record(receipt("r3", family="flow", unit="audio-second", units=3.0))
    by_type = {
        point["gen_ai.token.type"]: total
        for point, total in backend.points("gen_ai.client.token.usage")
    }
    assert by_type == {"input": 24, "output": 100}
    speech = dict(backend.spans[2].attributes)
    assert speech["gen_ai.output.type"] == "speech"
    assert speech["gen_ai.operation.name"] == "generate_content"
    assert "gen_ai.usage.output_tokens" not in speech


def test_measured_and_estimated_joules_are_apart_and_hardware_is_measured_only(backend):
    backend.telemetry.record(receipt("r1", gross_j=4.0))
    backend.telemetry.record(receipt("r2", gross_j=2.0))
    backend.telemetry.record(
        receipt("r3", gross_j=9.0, source="estimated", sensor="estimate:cpu-time")
    )
    by_source = {
        point["leangen.source"]: value for point, value in backend.points("leangen.energy")
    }
    assert by_source == {"measured": 6.0, "estimated": 9.0}
    assert backend.points("hw.energy") == [({"hw.id": "rapl:package-0", "hw.type": "cpu"}, 6.0)]


@pytest.mark.parametrize(
    ("sensor", "kind"),
    [
        ("rapl:package-1", "cpu"),
        ("rapl:dram-1", "memory"),
        ("nvml:0", "gpu"),
        ("amdgpu:0", "gpu"),
        ("ina3221:VDD_GPU_SOC", "gpu"),
        ("ina3221:VDD_IN", "power_supply"),
    ],
)
def test_hardware_types_are_the_conventions(sensor, kind):
    attributes = pytest.importorskip("opentelemetry.semconv._incubating.attributes.hw_attributes")
    assert otel.hardware_type(sensor) == kind
    assert kind in {member.value for member in attributes.HwTypeValues}


def test_the_whole_host_is_never_in_hw_energy(backend):
    meters = tuple(
        MeterWindow(sensor=sensor, source="measured", energy_uj=1_000_000)
        for sensor in ("rapl:psys", "external:wall")
    )
    entry = receipt("r1")
    from dataclasses import replace

    backend.telemetry.record(replace(entry, energy=replace(entry.energy, meters=meters)))
    assert "hw.energy" not in backend.metrics
    assert sorted(point["hw.id"] for point, _ in backend.points("hw.host.energy")) == [
        "external:wall",
        "rapl:psys",
    ]


def test_opentelemetry_is_loaded_on_use_and_its_absence_is_named():
    script = (
        "import sys; from leangen import otel, engine, api\n"
        "assert not any(name.startswith('opentelemetry') for name in sys.modules)\n"
        "sys.modules['opentelemetry'] = None\n"
        "from leangen.errors import DependencyError\n"
        "try: otel.Telemetry()\n"
        "except DependencyError as error: print(error)"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, check=True
    )
    assert "pip install 'leangen[otel]'" in done.stdout
