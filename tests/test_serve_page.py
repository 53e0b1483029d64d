"""The page at `/`, used in a headless Chromium: a model of every family, and what it cost."""

from __future__ import annotations

import os
import re
import shutil
from pathlib import Path

import gguf_fixtures
import numpy as np
import pytest
import serving

from leangen import audio
from leangen.exporters import gguf
from leangen.serve.app import PAGE

SHOWN = {
    "tiny-text": "#out",
    "tiny-translator": "#out",
    "tiny-ears": "#out",
    "tiny-vectors": "#out td",
    "tiny-voice": "#out audio",
    "tiny-flow": "#out td",
    "tiny-image": "#out img",
    "tiny-shot": "#out img",
    "tiny-pixels": "#out img",
    "tiny-rows": "#out img",
}
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def browser():
    """Chromium; the test is skipped where it or Playwright is not installed."""
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    with sync_api.sync_playwright() as playwright:
        arguments = ["--no-sandbox", "--no-proxy-server"]
        opened = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield opened
        opened.close()


@pytest.fixture
def page(browser):
    """A page whose complaints fail the test."""
    opened = browser.new_page(viewport={"width": 1000, "height": 900})
    complaints = []
    opened.on("pageerror", lambda error: complaints.append(str(error)))

    def said(message):
        if message.type == "error" and "401" not in message.text:  # the browser tells of refusals
            complaints.append(message.text)

    opened.on("console", said)
    yield opened
    opened.close()
    assert complaints == []


def test_the_page_knows_every_family():
    kinds = re.search(r"^const KINDS = {\n(.*?)^};", PAGE.read_text(), re.MULTILINE | re.DOTALL)[1]
    offered = {kind.strip('" ') for kind in re.findall(r"^  (.*?): {", kinds, re.MULTILINE)}
    assert offered == set(serving.NAMES)
    assert set(SHOWN) == set(serving.NAMES.values())


def fill(page, name, tmp_path):
    page.select_option("#model", name)
    if name == "tiny-ears":
        sound = tmp_path / "sound.wav"
        sound.write_bytes(audio.wav_bytes(np.sin(np.arange(16_000) / 10), 16_000))
        page.set_input_files("input[type=file]", sound)
    elif name == "tiny-voice":
        page.fill("textarea", "abc ab.")
    elif name == "tiny-text":
        page.fill("input[name=max_tokens]", "8")


def test_every_family_can_be_tried(page, tmp_path):
    models = serving.bundles(tmp_path)
    with serving.serving(models) as (address, server):
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        listed = page.eval_on_selector_all("#model option", "options => options.map(o => o.value)")
        assert set(listed) == set(SHOWN)
        for count, (name, shown) in enumerate(SHOWN.items(), 1):
            fill(page, name, tmp_path)
            page.click("#go")
            page.wait_for_selector(f"#rows tr:nth-child({count})", timeout=20_000)
            assert page.query_selector(shown)
            assert not page.query_selector("#out .error")
            cells = page.eval_on_selector_all(
                "#rows tr:first-child td", "cells => cells.map(c => c.textContent)"
            )
            assert cells[0] == name
            joules = float(re.match(r"[\d.e-]+", cells[2])[0])
            [receipt] = [r for r in server.ledger.entries() if r["id"].startswith(cells[-1])]
            assert joules == pytest.approx(receipt["energy"]["gross_j"], rel=0.01)
        assert "estimated" in page.text_content("#cost")
        if folder := os.environ.get("LEANGEN_SCREENSHOTS"):
            page.screenshot(path=Path(folder) / "page.png", full_page=True)


def test_a_language_model_without_conversations_completes(page, tmp_path):
    tiny = gguf_fixtures.Tiny(tied=False, template=None)
    path = gguf.export(gguf_fixtures.write(tmp_path / "plain.gguf", tiny), tmp_path / "plain").path
    with serving.serving([f"plain={path}"]) as (address, _):
        page.goto(address)
        page.wait_for_selector("#model option", state="attached")
        page.fill("input[name=max_tokens]", "8")
        page.click("#go")
        page.wait_for_selector("#rows tr", timeout=20_000)
        assert page.text_content("#out")
        assert not page.query_selector("#out .error")


def test_a_missing_key_is_asked_for(page, tmp_path):
    keys = tmp_path / "keys"
    keys.write_text("0123456789abcdef0123\n")
    text = next(model for model in serving.bundles(tmp_path) if model.startswith("tiny-text"))
    with serving.serving([text], api_key_file=keys) as (address, _):
        page.goto(address)
        page.wait_for_selector("#out .error")
        assert "API key" in page.text_content("#out")
        page.fill("#key", "0123456789abcdef0123")
        page.dispatch_event("#key", "change")
        page.wait_for_selector("#model option", state="attached")
