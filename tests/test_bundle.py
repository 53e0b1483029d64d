"""A bundle appears whole or not at all, and opens only when it is whole."""

import json
import shutil

import pytest

from leangen.bundle import MANIFEST, create, open_bundle, verify
from leangen.errors import BundleError, StorageError
from leangen.files import atomic_folder


def make(path, **changes):
    with create(path) as draft:
        draft.name, draft.family = "toy", "oneshot"
        draft.graphs = {"model": "model.onnx"}
        (draft.folder / "model.onnx").write_bytes(b"graph")
        (draft.folder / "model.onnx.data").write_bytes(b"weights" * 100)
        for name, value in changes.items():
            setattr(draft, name, value)
    return open_bundle(path)


def edit_manifest(path, change):
    manifest = json.loads((path / MANIFEST).read_text())
    change(manifest)
    (path / MANIFEST).write_text(json.dumps(manifest))


def test_what_was_written_is_read_back(tmp_path):
    bundle = make(tmp_path / "toy", config={"latent": 8})
    assert (bundle.name, bundle.family, bundle.config) == ("toy", "oneshot", {"latent": 8})
    assert bundle.graph("model").read_bytes() == b"graph"
    assert bundle.size_bytes == 5 + 700
    verify(bundle)


def test_the_digest_changes_with_any_byte_of_any_file(tmp_path):
    one = make(tmp_path / "one")
    with create(tmp_path / "two") as draft:
        draft.name, draft.family = "toy", "oneshot"
        draft.graphs = {"model": "model.onnx"}
        (draft.folder / "model.onnx").write_bytes(b"grapH")
        (draft.folder / "model.onnx.data").write_bytes(b"weights" * 100)
    assert open_bundle(tmp_path / "two").digest != one.digest


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_an_exception_while_writing_leaves_nothing(tmp_path, error):
    with pytest.raises(error), create(tmp_path / "toy") as draft:
        (draft.folder / "model.onnx").write_bytes(b"half")
        raise error
    assert list(tmp_path.iterdir()) == []


def test_an_exception_while_replacing_keeps_the_old_bundle(tmp_path):
    old = make(tmp_path / "toy")
    with pytest.raises(RuntimeError), create(tmp_path / "toy", replace=True) as draft:
        (draft.folder / "model.onnx").write_bytes(b"half")
        raise RuntimeError
    assert open_bundle(tmp_path / "toy").digest == old.digest
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_replacing_leaves_only_the_new_bundle(tmp_path):
    make(tmp_path / "toy")
    with create(tmp_path / "toy", replace=True) as draft:
        draft.name, draft.family = "new", "oneshot"
    assert open_bundle(tmp_path / "toy").name == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["toy"]


def test_an_existing_folder_is_not_overwritten_unasked(tmp_path):
    make(tmp_path / "toy")
    with pytest.raises(StorageError, match="exists already.*--force"), create(tmp_path / "toy"):
        pass


def test_two_at_once_leave_each_other_alone(tmp_path):
    """The staging folder of a living process is not taken for a killed one's."""
    with atomic_folder(tmp_path / "a") as first:
        (first / "x").write_text("1")
        with atomic_folder(tmp_path / "a") as second:
            (second / "x").write_text("2")
        assert (first / "x").read_text() == "1"
        shutil.rmtree(tmp_path / "a")
    assert (tmp_path / "a/x").read_text() == "1"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_of_two_at_once_the_first_to_end_stays(tmp_path):
    exists = pytest.raises(StorageError, match="exists already")
    with exists, atomic_folder(tmp_path / "a") as first:
        with atomic_folder(tmp_path / "a") as second:
            (second / "x").write_text("2")
        (first / "x").write_text("1")
    assert (tmp_path / "a/x").read_text() == "2"
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_a_manifest_that_names_a_missing_graph_is_not_put_in_place(tmp_path):
    with pytest.raises(BundleError, match="names 'gone.onnx'"):
        make(tmp_path / "toy", graphs={"model": "gone.onnx"})
    assert list(tmp_path.iterdir()) == []


def test_missing_weights_are_named(tmp_path):
    make(tmp_path / "toy")
    (tmp_path / "toy/model.onnx.data").unlink()
    with pytest.raises(BundleError, match=r"lacks 'model.onnx.data'.*pull or export"):
        open_bundle(tmp_path / "toy")


def test_truncated_weights_are_named_with_both_sizes(tmp_path):
    make(tmp_path / "toy")
    (tmp_path / "toy/model.onnx.data").write_bytes(b"short")
    with pytest.raises(BundleError, match="has 5 bytes, its manifest says 700"):
        open_bundle(tmp_path / "toy")


def test_a_flipped_byte_is_found_by_verify(tmp_path):
    bundle = make(tmp_path / "toy")
    (tmp_path / "toy/model.onnx.data").write_bytes(b"weightS" + b"weights" * 99)
    with pytest.raises(BundleError, match=r"'model.onnx.data' has sha256"):
        verify(bundle)


@pytest.mark.parametrize("name", ["../secret", "/etc/hostname", "a/../../b", "a\\..\\b"])
def test_names_that_leave_the_bundle_are_refused(tmp_path, name):
    make(tmp_path / "toy")
    (tmp_path / "secret").write_bytes(b"x")
    edit_manifest(
        tmp_path / "toy", lambda m: m["files"].update({name: {"bytes": 1, "sha256": "0"}})
    )
    with pytest.raises(BundleError, match="leaves the bundle"):
        open_bundle(tmp_path / "toy")


def test_a_link_out_of_the_bundle_is_refused(tmp_path):
    make(tmp_path / "toy")
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/model.onnx").write_bytes(b"graph")
    (tmp_path / "toy/model.onnx").unlink()
    (tmp_path / "toy/model.onnx").symlink_to(tmp_path / "secret/model.onnx")
    with pytest.raises(BundleError, match="link out of the bundle"):
        open_bundle(tmp_path / "toy")


@pytest.mark.parametrize("text", ["", "{", "[]", "null", '{"schema": "leangen.bundle/1"}'])
def test_a_damaged_manifest_is_one_clear_error(tmp_path, text):
    make(tmp_path / "toy")
    (tmp_path / "toy" / MANIFEST).write_text(text)
    with pytest.raises(BundleError, match="damaged.*export the model again"):
        open_bundle(tmp_path / "toy")


@pytest.mark.parametrize(
    "key, value", [("config", 5), ("name", 5), ("files", None), ("graphs", [])]
)
def test_an_entry_of_the_wrong_kind_is_named(tmp_path, key, value):
    make(tmp_path / "toy")
    edit_manifest(tmp_path / "toy", lambda m: m.update({key: value}))
    with pytest.raises(BundleError, match=f"damaged .*{key} is .*expected a JSON"):
        open_bundle(tmp_path / "toy")


def test_a_config_says_what_it_lacks(tmp_path):
    config = make(tmp_path / "toy").config
    assert config.get("nothing") is None and "nothing" not in config
    with pytest.raises(BundleError, match=r"leangen.json lacks 'nothing' in its config: export"):
        config["nothing"]


@pytest.mark.parametrize("kind", ["file", "folder"])
def test_only_a_bundle_or_an_empty_folder_is_replaced(tmp_path, kind):
    target = tmp_path / "precious"
    kept = target if kind == "file" else target / "letter.txt"
    kept.parent.mkdir(exist_ok=True)
    kept.write_text("kept")
    said = "is not a bundle, and --force replaces nothing else"
    with pytest.raises(StorageError, match=said), create(target, replace=True):
        raise AssertionError("work was begun")
    assert kept.read_text() == "kept"
    (tmp_path / "empty").mkdir()
    with create(tmp_path / "empty", replace=True) as draft:
        draft.graphs = {"model": "model.onnx"}
        (draft.folder / "model.onnx").touch()


def test_a_newer_schema_asks_for_an_update(tmp_path):
    make(tmp_path / "toy")
    edit_manifest(tmp_path / "toy", lambda m: m.update(schema="leangen.bundle/9"))
    with pytest.raises(BundleError, match="update leangen"):
        open_bundle(tmp_path / "toy")


def test_a_folder_that_is_no_bundle_says_what_to_give(tmp_path):
    with pytest.raises(BundleError, match=r"is not a bundle.*leangen pull --list"):
        open_bundle(tmp_path)
