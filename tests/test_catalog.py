"""Names: what they may look like, and that the catalog's own pins are well formed."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from leangen.bundle import create, sha256_file
from leangen.catalog import CATALOG, DATA, Packaged, Wheel, gguf_forms, parse_ref
from leangen.errors import DependencyError, UnknownModelError
from leangen.home import Home
from leangen.store import Store

SOURCES = {name: entry.source for name, entry in CATALOG.items()}
PINS = {n: source for n, source in (SOURCES | dict(DATA)).items() if isinstance(source, Wheel)}
PACKAGED = {n: source for n, source in SOURCES.items() if isinstance(source, Packaged)}


@pytest.mark.parametrize("name", PINS)
def test_a_pin_names_one_wheel_and_files_inside(name):
    wheel = PINS[name]
    assert re.fullmatch("[0-9a-f]{64}", wheel.sha256)
    assert wheel.filename.startswith(f"{wheel.package.replace('-', '_')}-{wheel.version}-")
    assert wheel.size_bytes > 0 and wheel.licence
    assert len({member.rsplit("/")[-1] for member in wheel.members}) == len(wheel.members) > 0


@pytest.mark.parametrize("name", PACKAGED)
def test_a_packaged_model_is_in_its_package_and_small(name, monkeypatch):
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "bench" / "zoo")
    source = PACKAGED[name]
    assert sha256_file(source.path) == source.sha256
    assert source.path.stat().st_size == source.size_bytes <= 12e6
    assert source.licence


def test_all_packaged_models_together_keep_an_edge_install_small():
    own = [source for source in PACKAGED.values() if source.distribution == "leangen"]
    assert sum(source.size_bytes for source in own) <= 12e6


def test_a_model_of_a_distribution_that_is_not_there_says_how_to_get_it(tmp_path, monkeypatch):
    elsewhere = replace(CATALOG["fashion-ddpm"].source, distribution="leangen-nowhere")
    entry = replace(CATALOG["fashion-ddpm"], source=elsewhere)
    store = Store(tmp_path, catalog={entry.name: entry})
    with pytest.raises(DependencyError, match="leangen-nowhere, which is not installed: `pip"):
        store.resolve("fashion-ddpm")


def test_models_and_data_never_share_a_name():
    assert not set(CATALOG) & set(DATA)


@pytest.mark.parametrize("entry", CATALOG.values(), ids=lambda entry: entry.name)
def test_every_entry_has_a_reference_and_says_what_its_aliases_are(entry):
    assert "fp32" in entry.forms
    for alias, scheme in entry.aliases.items():
        assert alias not in entry.forms and scheme in entry.forms and entry.notes[alias]


@pytest.mark.parametrize(
    ("kind", "aliases"), [("Q4_1", {"int4": "gguf"}), ("Q4_K_M", {"int4": "gguf"}), ("Q8_0", {})]
)
def test_int4_is_the_lossless_form_of_a_4_bit_gguf_only(kind, aliases):
    assert gguf_forms(kind).get("aliases", {}) == aliases


def test_a_float_gguf_has_no_packed_form():
    assert list(gguf_forms("BF16")["forms"]) == ["fp32"]


@pytest.mark.parametrize(
    ("text", "name", "scheme"),
    [
        ("smollm2-135m", "smollm2-135m", None),
        ("smollm2-135m:int4", "smollm2-135m", "int4"),
        ("hf:org/name", "hf:org/name", None),
        ("hf:org/name:gguf", "hf:org/name", "gguf"),
        ("hf:org/name/sub/m.Q4_0.gguf:int8", "hf:org/name/sub/m.Q4_0.gguf", "int8"),
        ("hf:org/name@v1.0:int4", "hf:org/name@v1.0", "int4"),
        ("hf:org/name@refs/pr/1", "hf:org/name@refs/pr/1", None),
    ],
)
def test_names_are_read(text, name, scheme):
    ref = parse_ref(text)
    assert (ref.name, ref.scheme, ref.path) == (name, scheme, None)
    assert str(ref) == text


@pytest.mark.parametrize("text", ["./m", "/a/b", "../m", "a/b", "~/m", "./terrain", "./x:int4"])
def test_what_looks_like_a_path_is_one(text):
    ref = parse_ref(text)
    assert ref.path is not None and ref.name == ""


def test_a_bundle_folder_needs_no_slash_but_a_catalog_name_wins(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("mine", "terrain"):
        with create(tmp_path / name) as draft:
            draft.name = name
    assert parse_ref("mine").path is not None
    assert parse_ref("terrain").path is None


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "C:\\models\\m",
        "terrain\\int8",
        "terrain:",
        "terrain:../../x",
        "terrain:int8:int4",
        "terrain\n",
        "terrain\0",
        "hf:",
        "hf:name",
        "hf:../x",
        "hf:a/../b",
        "hf:a/b/../../c",
        "hf:a/b@../c",
        "hf://a/b",
        "~nobody-of-that-name/x",
        "--list",
    ],
)
def test_weird_names_are_refused(text):
    with pytest.raises(UnknownModelError):
        parse_ref(text)


def test_a_typo_gets_the_nearest_name():
    with pytest.raises(UnknownModelError, match=r"smolm2-135.*did you mean smollm2-135m\?.*--list"):
        parse_ref("smolm2-135:int4")
    with pytest.raises(UnknownModelError, match="did you mean piper-joe"):
        parse_ref("piper")


def test_a_file_is_told_how_to_become_a_bundle(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "m.gguf").touch()
    with pytest.raises(UnknownModelError, match="leangen export m.gguf -o DIR"):
        parse_ref("m.gguf")


@given(st.text(max_size=40) | st.from_regex(r"hf:[a-z./@:-]{0,20}", fullmatch=True))
def test_any_text_is_refused_or_names_one_folder_of_the_store(text):
    try:
        ref = parse_ref(text)
    except UnknownModelError:
        return
    if ref.path is None:
        home = Home()
        assert home.models(ref.name).resolve().parent == home.path.resolve() / "models"
        assert ref.scheme is None or re.fullmatch(r"[A-Za-z0-9][\w.-]*", ref.scheme)


def test_a_hint_names_each_model_once():
    with pytest.raises(UnknownModelError, match=r"did you mean terrain\? "):
        parse_ref("terain", ["terrain", "terrain"])
