"""Wheels: real pip against a local folder; the right bytes arrive whole, or nothing does."""

import dataclasses
import sys
import venv
import zipfile

import pytest
from store_fakes import PAYLOAD, build_wheel

from leangen.bundle import sha256_file
from leangen.errors import ChecksumError, DependencyError, SourceError, StorageError
from leangen.fetch import fetch_wheel
from leangen.files import size_of


@pytest.fixture
def index(tmp_path, monkeypatch):
    """A folder that is pip's only index."""
    folder = tmp_path / "index"
    folder.mkdir()
    for name in ("PIP_INDEX_URL", "PIP_EXTRA_INDEX_URL"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    return folder


@pytest.fixture
def target(tmp_path):
    return tmp_path / "store" / "toy"


def nothing_in(target):
    return not target.parent.exists() or not any(target.parent.iterdir())


def fake_pip(code):
    return (sys.executable, "-c", code)


def test_the_members_arrive_side_by_side_and_nothing_else(index, target):
    wheel = build_wheel(index, noise_bytes=100)
    fetch_wheel(wheel, target)
    assert sorted(path.name for path in target.iterdir()) == ["toy.bin", "toy.bin.json"]
    assert (target / "toy.bin").read_bytes() == PAYLOAD
    assert [path.name for path in target.parent.iterdir()] == ["toy"]


def test_progress_rises_to_the_size_of_the_wheel(index, target):
    wheel, seen = build_wheel(index), []
    fetch_wheel(wheel, target, progress=lambda *call: seen.append(call))
    done = [bytes_done for bytes_done, _, _ in seen]
    assert done[-1] == wheel.size_bytes and max(done) <= wheel.size_bytes
    assert {(total, what) for _, total, what in seen} == {
        (wheel.size_bytes, "downloading toy-model==1.0")
    }


def test_other_bytes_than_the_pinned_are_refused(index, target):
    wheel = dataclasses.replace(build_wheel(index), sha256="0" * 64)
    with pytest.raises(ChecksumError, match=f"sha256 [0-9a-f]{{64}}, expected {'0' * 64}"):
        fetch_wheel(wheel, target)
    assert nothing_in(target)


def test_a_wheel_at_hand_needs_no_pip_and_must_be_the_same_bytes(tmp_path, target):
    wheel = build_wheel(tmp_path / "disk")
    file = tmp_path / "disk" / wheel.filename
    fetch_wheel(wheel, target, from_file=file, pip=("/no/such/program",))
    assert (target / "toy.bin").read_bytes() == PAYLOAD
    assert file.exists()
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(ChecksumError, match="damaged"):
        fetch_wheel(wheel, target.with_name("again"), from_file=file)
    with pytest.raises(SourceError, match="No such file"):
        fetch_wheel(wheel, target.with_name("again"), from_file=tmp_path / "none.whl")


def test_a_truncated_wheel_with_the_right_hash_is_still_refused(tmp_path, target):
    wheel = build_wheel(tmp_path / "disk")
    file = tmp_path / "disk" / wheel.filename
    file.write_bytes(file.read_bytes()[:-30])
    with pytest.raises(SourceError, match="not a whole wheel"):
        fetch_wheel(dataclasses.replace(wheel, sha256=sha256_file(file)), target, from_file=file)
    assert nothing_in(target)


def test_damaged_contents_are_found_by_their_crc(tmp_path, target):
    wheel = build_wheel(tmp_path / "disk", members={"a/toy.bin": b"q" * 50})
    file = tmp_path / "disk" / wheel.filename
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr("a/toy.bin", b"q" * 50)
    file.write_bytes(file.read_bytes().replace(b"q" * 50, b"q" * 49 + b"p"))
    with pytest.raises(SourceError, match="not a whole wheel.*CRC"):
        fetch_wheel(dataclasses.replace(wheel, sha256=sha256_file(file)), target, from_file=file)


def test_a_member_that_is_not_there_is_named(index, target):
    wheel = dataclasses.replace(build_wheel(index), members=("toy_model/other.bin",))
    with pytest.raises(SourceError, match=r"toy_model-1\.0.*holds no 'toy_model/other.bin'"):
        fetch_wheel(wheel, target)
    assert nothing_in(target)


def test_a_member_cannot_leave_its_folder(tmp_path, target):
    wheel = build_wheel(tmp_path / "disk", members={"../../evil/toy.bin": b"x"})
    fetch_wheel(wheel, target, from_file=tmp_path / "disk" / wheel.filename)
    assert [path.name for path in target.iterdir()] == ["toy.bin"]


def test_a_version_that_the_index_lacks(index, target):
    wheel = dataclasses.replace(build_wheel(index), version="9.9")
    with pytest.raises(SourceError, match=r"toy-model==9.9.*No matching distribution.*--from"):
        fetch_wheel(wheel, target)
    assert nothing_in(target)


def test_no_network(index, target, monkeypatch):
    monkeypatch.delenv("PIP_NO_INDEX")
    monkeypatch.setenv("PIP_INDEX_URL", "http://127.0.0.1:9/simple")
    monkeypatch.setenv("PIP_RETRIES", "1")
    with pytest.raises(SourceError, match="index does not answer.*check the network.*--from"):
        fetch_wheel(dataclasses.replace(build_wheel(index), version="9.9"), target)
    assert nothing_in(target)


def test_an_environment_without_pip(index, target, tmp_path):
    venv.create(tmp_path / "bare", with_pip=False)
    python = str(tmp_path / "bare" / "bin" / "python")
    with pytest.raises(DependencyError, match="no pip; install it .*ensurepip.*--from toy_model"):
        fetch_wheel(build_wheel(index), target, pip=(python, "-m", "pip"))
    with pytest.raises(DependencyError, match="'/no/such/program' does not run"):
        fetch_wheel(build_wheel(index), target, pip=("/no/such/program",))
    assert nothing_in(target)


def test_a_disk_that_fills_up_under_pip(index, target):
    says = "import sys; sys.exit('ERROR: Could not install: [Errno 28] No space left on device')"
    with pytest.raises(StorageError, match="disk full while downloading toy-model==1.0"):
        fetch_wheel(build_wheel(index), target, pip=fake_pip(says))
    assert nothing_in(target)


def test_pip_that_delivers_nothing_or_says_nothing(index, target):
    with pytest.raises(SourceError, match="delivered 0 wheels"):
        fetch_wheel(build_wheel(index), target, pip=fake_pip("pass"))
    with pytest.raises(SourceError, match="said nothing"):
        fetch_wheel(build_wheel(index), target, pip=fake_pip("raise SystemExit(3)"))


def test_size_of_counts_files_once_and_follows_no_link(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "b").write_bytes(b"x" * 5)
    (tmp_path / "sub" / "link").symlink_to(tmp_path / "a")
    (tmp_path / "sub" / "dangling").symlink_to(tmp_path / "none")
    assert size_of(tmp_path) == 15
    assert size_of(tmp_path / "none") == 0
