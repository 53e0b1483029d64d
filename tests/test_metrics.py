"""Prometheus: the ledger's sums as metrics that keep sources apart and never go back."""

from __future__ import annotations

import signal
import subprocess
import sys
import urllib.error
import urllib.request
from dataclasses import replace

import pytest
from receipt_fakes import receipt

from leangen import metrics
from leangen.cli import main
from leangen.errors import RequestError
from leangen.ledger import Ledger
from leangen.store import Store

pytest.importorskip("prometheus_client", reason="needs the extra metrics")

from prometheus_client.parser import text_string_to_metric_families


@pytest.fixture
def ledger(tmp_path):
    with Ledger(tmp_path / "ledger.sqlite") as opened:
        yield opened


def fill(ledger, *receipts):
    for entry in receipts:
        ledger.append(entry)
    ledger.flush()


def samples(text):
    return {
        (sample.name, *sorted(sample.labels.values())): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


def test_every_sum_of_the_ledger_is_there(ledger):
    fill(
        ledger,
        receipt("a", gross_j=4.0),
        receipt("b", gross_j=2.0),
        receipt("c", source="estimated", gross_j=9.0),
        receipt("d", gross_j=None),
        receipt("e", model="piper", scheme="int8", family="flow", unit="audio-second", units=3.5),
    )
    found = samples(metrics.text(ledger))
    assert found["leangen_ledger_up",] == 1
    for row in ledger.summary():
        model, scheme = row.group["model"], row.group["scheme"]
        key = sorted((model, scheme, row.source))
        assert found["leangen_generations_total", *key] == row.receipts
        if row.gross_uj is None:
            assert ("leangen_energy_joules_total", *key) not in found, "unknown is not 0"
            assert ("leangen_emissions_grams_total", *key) not in found
        else:
            assert found["leangen_energy_joules_total", *key] == row.gross_uj / 1e6
            assert found["leangen_energy_uncertainty_joules", *key] == pytest.approx(row.u_j)
            assert found["leangen_emissions_grams_total", *key] == pytest.approx(row.carbon_g)
    assert found["leangen_units_total", "int4", "smollm2-135m", "token"] == 256
    assert found["leangen_units_total", "audio-second", "int8", "piper"] == 3.5
    assert found["leangen_unmeasured_generations_total", "int4", "smollm2-135m"] == 1
    assert found["leangen_generation_seconds_total", "int4", "smollm2-135m"] == 2.0


def test_genai_names_are_opentelemetrys_in_prometheus_form(ledger):
    fill(ledger, receipt("a"), receipt("b", family="flow", model="piper", unit="audio-second"))
    families = {f.name: f for f in text_string_to_metric_families(metrics.text(ledger))}
    duration = families["gen_ai_client_operation_duration_seconds"]
    assert {tuple(sorted(sample.labels)) for sample in duration.samples} == {
        ("gen_ai_operation_name", "gen_ai_provider_name", "gen_ai_request_model")
    }
    by_name = {
        (sample.name, sample.labels["gen_ai_request_model"]): sample.value
        for sample in duration.samples
    }
    assert by_name["gen_ai_client_operation_duration_seconds_count", "smollm2-135m:int4"] == 1
    assert by_name["gen_ai_client_operation_duration_seconds_sum", "piper:int4"] == 0.5
    usage = families["gen_ai_client_token_usage"].samples
    assert {sample.labels["gen_ai_token_type"] for sample in usage} == {"output"}
    assert {sample.labels["gen_ai_request_model"] for sample in usage} == {"smollm2-135m:int4"}


def test_names_follow_prometheus_conventions(ledger):
    fill(ledger, receipt("a"))
    for family in text_string_to_metric_families(metrics.text(ledger)):
        assert family.documentation.endswith(".")
        for sample in family.samples:
            if family.type == "counter":
                assert sample.name.endswith("_total")
        if "energy" in family.name:
            assert "joules" in family.name


def test_counters_do_not_go_back_when_an_overlap_is_found(ledger):
    """The energy of overlapping windows is split: one model's sum falls, its counter must not."""

    def window(name, begin_ns, **fields):
        return replace(receipt(name, **fields), begin_boottime_ns=begin_ns)

    collector = metrics.LedgerCollector(ledger)

    def joules(model):
        return next(
            sample.value
            for family in collector.collect()
            for sample in family.samples
            if sample.name == "leangen_energy_joules_total" and sample.labels["model"] == model
        )

    fill(ledger, window("a", 0, model="one"))
    assert joules("one") == 4.1
    fill(ledger, window("b", 0, model="two"))
    assert ledger.summary(("model",))[0].gross_uj == 2_050_000
    assert joules("one") == 4.1
    assert joules("two") == 2.05


def test_an_empty_or_damaged_ledger(ledger, capsys):
    assert samples(metrics.text(ledger)) == {("leangen_ledger_up",): 1}
    ledger.path.write_text("this is no ledger, it is a text")
    assert samples(metrics.text(ledger)) == {("leangen_ledger_up",): 0}
    assert "is not a ledger" in capsys.readouterr().err


def test_it_is_served_on_loopback(ledger):
    fill(ledger, receipt("a"))
    server, thread = metrics.start(ledger, "127.0.0.1:0")
    try:
        host, port = server.server_address[:2]
        assert host == "127.0.0.1"
        with urllib.request.urlopen(f"http://{host}:{port}/metrics", timeout=10) as answer:
            served = samples(answer.read().decode())
        assert served["leangen_energy_joules_total", "int4", "measured", "smollm2-135m"] == 4.1
        with pytest.raises(RequestError, match=f"cannot listen on 127.0.0.1:{port}: Address"):
            metrics.start(ledger, f"127.0.0.1:{port}")
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@pytest.mark.parametrize("listen", ["", "localhost", "localhost:http", "localhost:99999"])
def test_a_bad_address_is_refused(ledger, listen):
    with pytest.raises(RequestError, match="expected HOST:PORT such as 127.0.0.1:9464"):
        metrics.start(ledger, listen)


def test_the_command_prints_them(capsys):
    with Ledger(Store().ledger_path) as book:
        fill(book, receipt("a"))
    assert main(["metrics"]) == 0
    found = samples(capsys.readouterr().out)
    assert found["leangen_generations_total", "int4", "measured", "smollm2-135m"] == 1


@pytest.mark.parametrize("ended_by", [signal.SIGINT, signal.SIGTERM])
def test_serving_ends_when_interrupted(tmp_path, ended_by):
    script = (  # a test that runs in the background would hand down an ignored SIGINT
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "from leangen.cli import main; sys.exit(main(['metrics', '--listen', '127.0.0.1:0']))"
    )
    command = [sys.executable, "-c", script]
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as server:
        try:
            line = server.stderr.readline()
            assert "metrics at http://127.0.0.1:" in line
            server.send_signal(ended_by)
            _, rest = server.communicate(timeout=30)
            assert (server.returncode, "Traceback" in rest) == (0, False), rest
        finally:
            server.kill()


def test_the_missing_library_is_named():
    script = (
        "import sys; sys.modules['prometheus_client'] = None\n"
        "from leangen.cli import main; sys.exit(main(['metrics']))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 2
    assert "pip install 'leangen[metrics]'" in done.stderr
    assert "Traceback" not in done.stderr
