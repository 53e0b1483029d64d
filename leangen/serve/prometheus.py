"""The server's own metrics, beside those of the ledger (`leangen.metrics`).

Names and meanings are vLLM's with `leangen` for its prefix, so that its dashboards need one
replacement; energy follows the hardware conventions: joules and watts, by source.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import TYPE_CHECKING, Any, cast

from leangen.errors import DependencyError
from leangen.ledger import Ledger
from leangen.metrics import LedgerCollector
from leangen.records import Output, Receipt
from leangen.serve.account import Account

if TYPE_CHECKING:
    from prometheus_client.core import Metric

_TTFT_S = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30)
_TOKEN_S = (0.005, 0.01, 0.02, 0.03, 0.05, 0.075, 0.1, 0.15, 0.25, 0.5, 1, 2.5)
_REQUEST_S = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCH = (1, 2, 4, 8, 16, 32, 64)

Figures = Callable[[], Mapping[str, Mapping[str, float]]]
"""By model: `running`, `waiting`, `kv_cache_usage`, `loaded`."""


class Metrics:
    """Counts what happens. Raises DependencyError without the extra `serve`."""

    def __init__(self) -> None:
        try:
            import prometheus_client as client
            from prometheus_client import core
        except ModuleNotFoundError as error:
            if error.name != "prometheus_client":
                raise
            raise DependencyError(
                "the server needs its libraries: pip install 'leangen[serve]'"
            ) from error
        self._client, self._core = client, core
        self.registry = client.CollectorRegistry()

        def histogram(name: str, text: str, buckets: tuple[float, ...]) -> Any:
            return client.Histogram(
                f"leangen_{name}", text, ["model_name"], buckets=buckets, registry=self.registry
            )

        def counter(name: str, text: str, *labels: str) -> Any:
            names = ["model_name", *labels]
            return client.Counter(f"leangen_{name}", text, names, registry=self.registry)

        self._queue = histogram("request_queue_time_seconds", "Time in the queue.", _TTFT_S)
        self._ttft = histogram(
            "time_to_first_token_seconds", "From arrival to the first unit.", _TTFT_S
        )
        self._later = histogram(
            "inter_token_latency_seconds", "Between two units of a request.", _TOKEN_S
        )
        self._whole = histogram(
            "e2e_request_latency_seconds", "From arrival to the end.", _REQUEST_S
        )
        self._batch = histogram("iteration_batch_size", "Requests in a step.", _BATCH)
        self._prompt = counter("prompt_tokens", "Units of input, by requests that have ended.")
        self._output = counter("generation_tokens", "Units generated, by requests that have ended.")
        self._requests = counter("request_success", "Requests that have ended.", "finished_reason")
        self._refused = client.Counter(
            "leangen_request_refused", "Requests refused.", ["code"], registry=self.registry
        )
        self._joules = counter("request_energy_joules", "Energy of requests.", "source")

    def watch(self, account: Account, ledger: Ledger | None, figures: Figures) -> None:
        """Read these at each scrape too."""
        self.registry.register(_Now(self._core, account, figures))
        if ledger is not None:
            self.registry.register(LedgerCollector(ledger))

    def queued(self, model: str, seconds: float) -> None:
        """A job left the queue after `seconds`."""
        self._queue.labels(model).observe(seconds)

    def stepped(self, model: str, jobs: int) -> None:
        """A step gave something to so many jobs."""
        self._batch.labels(model).observe(jobs)

    def first_unit(self, model: str, seconds: float) -> None:
        """A job's first unit of work was done."""
        self._ttft.labels(model).observe(seconds)

    def later_unit(self, model: str, seconds: float) -> None:
        """A job's next one was."""
        self._later.labels(model).observe(seconds)

    def finished(
        self, model: str, receipt: Receipt, output: Output | None, elapsed_ns: int
    ) -> None:
        """A job ended."""
        self._whole.labels(model).observe(elapsed_ns / 1e9)
        self._prompt.labels(model).inc(receipt.units.prompt)
        self._output.labels(model).inc(receipt.units.count)
        reason = "cancelled" if output is None else output.stop_reason or "done"
        self._requests.labels(model, reason).inc()
        if receipt.energy.gross_j is not None:
            self._joules.labels(model, receipt.energy.source).inc(receipt.energy.gross_j)

    def refused(self, code: str) -> None:
        """A request was answered with an error."""
        self._refused.labels(code).inc()

    def exposition(self) -> bytes:
        """All in Prometheus's text format."""
        text: bytes = self._client.generate_latest(self.registry)
        return text


def gathered(expositions: Mapping[str, str]) -> bytes:
    """The metrics of many servers as one page: each sample labelled with its `replica`, the key.

    >>> text = "# HELP a b\\n# TYPE a gauge\\na 1.0\\n"
    >>> print(gathered({"x": text, "y": text}).decode(), end="")
    # HELP a b
    # TYPE a gauge
    a{replica="x"} 1.0
    a{replica="y"} 1.0
    """
    from prometheus_client import exposition, parser

    families: dict[str, Metric] = {}
    for replica, text in expositions.items():
        for family in parser.text_string_to_metric_families(text):
            kept = families.setdefault(family.name, family)
            own = [
                sample._replace(labels=sample.labels | {"replica": replica})
                for sample in family.samples
            ]
            kept.samples = own if kept is family else [*kept.samples, *own]

    class Page:
        def collect(self) -> Iterator[Metric]:
            return iter(families.values())

    page: bytes = exposition.generate_latest(cast("Any", Page()))
    return page


class _Now:
    """What is read at the scrape."""

    def __init__(self, core: Any, account: Account, figures: Figures) -> None:
        self._core = core
        self._account = account
        self._figures = figures

    def collect(self) -> Iterator[Metric]:
        """Gauges by model, and the account's counters."""
        core, figures = self._core, self._figures()
        for key, name, text in (
            ("running", "leangen_num_requests_running", "Requests that run."),
            ("waiting", "leangen_num_requests_waiting", "Requests that wait."),
            ("kv_cache_usage", "leangen_kv_cache_usage_perc", "Fullness of the cache, 1 is full."),
            ("loaded", "leangen_model_loaded", "Whether the model is in memory."),
        ):
            gauge = core.GaugeMetricFamily(name, text, labels=["model_name"])
            for model, values in figures.items():
                gauge.add_metric([model], values[key])
            yield gauge
        source = [self._account.selection.source]
        for name, text, energy_uj in (
            (
                "leangen_serving_energy_joules",
                "Energy while requests were served.",
                self._account.total_uj,
            ),
            (
                "leangen_unattributed_energy_joules",
                "The part of it that no request could be charged with.",
                self._account.unattributed_uj,
            ),
        ):
            counter = core.CounterMetricFamily(name, text, labels=["source"])
            counter.add_metric(source, energy_uj / 1e6)
            yield counter
        power = core.GaugeMetricFamily(
            "leangen_serving_power_watts", "Mean power of the last stretch.", labels=["source"]
        )
        power.add_metric(source, self._account.power_w)
        yield power
