"""The ledger's sums for Prometheus, in its text exposition format.

    leangen_energy_joules_total           model, scheme, source      gross energy
    leangen_energy_uncertainty_joules     model, scheme, source      its u at k = 2
    leangen_emissions_grams_total         model, scheme, source      operational CO2e
    leangen_generations_total             model, scheme, source
    leangen_unmeasured_generations_total  model, scheme              those without a figure
    leangen_generation_seconds_total      model, scheme
    leangen_units_total                   model, scheme, unit        tokens, images, audio-seconds
    gen_ai_client_operation_duration_seconds, gen_ai_client_token_usage
                                          sum and count, labelled as OpenTelemetry's conventions for
                                          generative AI say, for dashboards that know these
    leangen_ledger_up                     0 when the ledger could not be read

Figures of different `source` must not be added: `measured` and `estimated` are kept apart by that
label, and a generation without a figure adds no joule. Names end in the unit, and in `_total` for
counters, as Prometheus recommends. The client library is the extra `metrics`.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Any, cast

from leangen.console import say
from leangen.errors import LeangenError, RequestError, needs
from leangen.ledger import Ledger, Sum, total
from leangen.otel import PROVIDER, operation

if TYPE_CHECKING:
    from prometheus_client.core import Metric

PORT = 9464
"""OpenTelemetry's default port for a Prometheus endpoint."""
LOOPBACK = ("127.0.0.1", "localhost", "::1")


class LedgerCollector:
    """A collector for a `prometheus_client` registry: reads the ledger at each scrape.

    A counter never goes back here. In the ledger a sum of one model may, by a little, when another
    process turns out to have generated at the same time and the energy is split between them;
    Prometheus would take that for a restart and count everything once more.
    """

    def __init__(self, ledger: Ledger) -> None:
        self._ledger = ledger
        self._highest: dict[tuple[str, ...], float] = {}

    def collect(self) -> Iterator[Metric]:
        """The metrics; only `leangen_ledger_up 0` when the ledger cannot be read."""
        client = _client()
        try:
            sums = self._ledger.summary(("model", "scheme", "family"))
        except LeangenError as error:
            say(f"leangen: error: {error}")
            sums = None
        yield client.GaugeMetricFamily(
            "leangen_ledger_up", "Whether the ledger could be read.", float(sums is not None)
        )
        if sums:
            yield from self._counters(client, sums)
            yield _uncertainty(client, sums)
            yield from _conventional(client, sums)

    def _counters(self, client: Any, sums: Iterable[Sum]) -> Iterator[Metric]:
        values: dict[str, dict[tuple[str, ...], float]] = {name: {} for name in _COUNTERS}

        def add(name: str, labels: tuple[str, ...], value: float | None) -> None:
            if value is not None:
                values[name][labels] = values[name].get(labels, 0.0) + value

        for row in sums:
            model = (str(row.group["model"]), str(row.group["scheme"]))
            sourced = (*model, row.source)
            add("leangen_energy_joules", sourced, _joules(row))
            add("leangen_emissions_grams", sourced, row.carbon_g)
            add("leangen_generations", sourced, row.receipts)
            add("leangen_unmeasured_generations", model, row.unmeasured)
            add("leangen_generation_seconds", model, row.duration_s)
            add("leangen_units", (*model, row.unit), row.units)
        for name, (text, labels) in _COUNTERS.items():
            family = client.CounterMetricFamily(name, text, labels=labels)
            for key, value in values[name].items():
                highest = max(value, self._highest.get((name, *key), 0.0))
                self._highest[name, *key] = highest
                family.add_metric(key, highest)
            yield family


_SOURCED = ("model", "scheme", "source")
_COUNTERS = {
    "leangen_energy_joules": ("Gross energy of generations, by how it was got.", _SOURCED),
    "leangen_emissions_grams": ("Operational gCO2e of generations.", _SOURCED),
    "leangen_generations": ("Generations, by how their energy was got.", _SOURCED),
    "leangen_unmeasured_generations": ("Generations without an energy figure.", _SOURCED[:2]),
    "leangen_generation_seconds": ("Time spent generating.", _SOURCED[:2]),
    "leangen_units": ("Work done, in the model's unit.", (*_SOURCED[:2], "unit")),
}


def _joules(row: Sum) -> float | None:
    return None if row.gross_uj is None else row.gross_uj / 1e6


def _uncertainty(client: Any, sums: Iterable[Sum]) -> Metric:
    family = client.GaugeMetricFamily(
        "leangen_energy_uncertainty_joules",
        "Uncertainty of leangen_energy_joules_total at k = 2.",
        labels=_SOURCED,
    )
    parts: dict[tuple[str, ...], list[Sum]] = defaultdict(list)
    for row in sums:
        if row.gross_uj is not None:
            parts[str(row.group["model"]), str(row.group["scheme"]), row.source].append(row)
    for labels, rows in parts.items():
        family.add_metric(labels, total(rows, {}).u_j or 0.0)
    return cast("Metric", family)


def _conventional(client: Any, sums: Iterable[Sum]) -> Iterator[Metric]:
    """GenAI metrics as summaries: a ledger's sums have no buckets; rates work the same."""
    labels = ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
    runs: dict[tuple[str, ...], list[Sum]] = defaultdict(list)
    for row in sums:
        runs[operation(str(row.group["family"])), PROVIDER, _ref(row)].append(row)
    duration = client.SummaryMetricFamily(
        "gen_ai_client_operation_duration_seconds", "GenAI operation duration.", labels=labels
    )
    usage = client.SummaryMetricFamily(
        "gen_ai_client_token_usage",
        "Number of output tokens used.",
        labels=(*labels, "gen_ai_token_type"),
    )
    for key, rows in runs.items():
        seconds = sum(row.duration_s for row in rows)
        duration.add_metric(key, sum(row.receipts for row in rows), seconds)
        rows = [row for row in rows if row.unit == "token"]
        if rows:
            tokens = sum(row.units for row in rows)
            usage.add_metric((*key, "output"), sum(row.receipts for row in rows), tokens)
    yield duration
    yield usage


def _ref(row: Sum) -> str:
    return f"{row.group['model']}:{row.group['scheme']}"


def text(ledger: Ledger) -> str:
    """The metrics once, as Prometheus reads them, for example through a textfile collector.

    Raises DependencyError without the extra `metrics`.
    """
    _client()
    from prometheus_client import CollectorRegistry, generate_latest

    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    exposition: bytes = generate_latest(registry)
    return exposition.decode()


def start(ledger: Ledger, listen: str) -> tuple[Any, Any]:
    """Serve the metrics at `HOST:PORT` in a thread of their own: (server, thread).

    Port 0 takes a free one. Raises RequestError for a bad or taken address, DependencyError without
    the extra `metrics`.
    """
    _client()
    from prometheus_client import CollectorRegistry, start_http_server

    host, port = _address(listen)
    registry = CollectorRegistry()
    registry.register(LedgerCollector(ledger))
    try:
        server, thread = start_http_server(port, addr=host, registry=registry)
    except OSError as error:
        raise RequestError(
            f"cannot listen on {listen}: {error.strerror or error}; choose another HOST:PORT"
        ) from error
    return server, thread


def serve(ledger: Ledger, listen: str) -> None:
    """Serve the metrics at `HOST:PORT` until Ctrl-C or SIGTERM; errors as in `start`."""
    server, thread = start(ledger, listen)
    host, port = server.server_address[:2]
    try:
        if _address(listen)[0] not in LOOPBACK:
            say("note: whoever can reach this address can read them, there is no password")
        say(f"metrics at http://{host}:{port}/metrics, Ctrl-C ends")
        thread.join()
    except (KeyboardInterrupt, SystemExit):  # a service is stopped by SIGTERM, which is no failure
        say("")
    finally:
        server.shutdown()
        server.server_close()


def _address(listen: str) -> tuple[str, int]:
    host, _, port = listen.rpartition(":")
    if not port.isdigit() or int(port) > 65535:
        raise RequestError(f"listen is {listen!r}, expected HOST:PORT such as 127.0.0.1:{PORT}")
    return host.strip("[]") or LOOPBACK[0], int(port)


def _client() -> Any:
    message = "metrics for Prometheus need its client library: pip install 'leangen[metrics]'"
    with needs("prometheus_client", message=message):
        from prometheus_client import core
    return core
