"""The files beside the server are true: what the dashboard shows, what unit and image run."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import httpx
import pytest
import serving
import tiny_bundles
from prometheus_client.parser import text_string_to_metric_families

from leangen import cli, serve

ASSETS = Path(serve.__file__).parent / "assets"


def test_the_dashboard_shows_metrics_that_there_are(tmp_path):
    models = [f"tiny-text={tiny_bundles.language(tmp_path).path}"]
    with (
        serving.serving(models) as (address, _),
        httpx.Client(base_url=address, trust_env=False, timeout=30) as http,
    ):
        asked = {"model": "tiny-text", "prompt": "hello", "max_tokens": 3, "ignore_eos": True}
        assert http.post("/v1/completions", json=asked).status_code == 200
        assert http.post("/v1/completions", json={}).status_code == 400
        families = list(text_string_to_metric_families(http.get("/metrics").text))
    labels = {}
    for family in families:
        for sample in family.samples:
            labels.setdefault(sample.name, set()).update(sample.labels)
    dashboard = json.loads((ASSETS / "grafana.json").read_text())
    targets = [target for panel in dashboard["panels"] for target in panel["targets"]]
    assert len(targets) > 10
    for target in targets:
        names = re.findall(r"\bleangen_\w+", target["expr"])
        assert names
        for name in names:
            assert name in labels
        for shown in re.findall(r"{{(\w+)}}", target["legendFormat"]):
            assert any(shown in labels[name] for name in names)


@pytest.mark.parametrize("file", ["leangen.service", "Containerfile"])
def test_the_commands_are_leangens(file):
    text = (ASSETS / file).read_text()
    if file == "Containerfile":
        lists = [json.loads(part) for part in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)$", text, re.M)]
        command = [word for words in lists for word in words]
    else:
        command = shlex.split(re.search(r"^ExecStart=/usr/bin/env (.*)$", text, re.M)[1])
    assert command[0] == "leangen"
    arguments = cli._parser().parse_args(command[1:])
    assert arguments.models == ["smollm2-135m:int4"]
    grace = re.search(r"TimeoutStopSec=(\d+)", text)
    assert grace is None or int(grace[1]) > arguments.grace
