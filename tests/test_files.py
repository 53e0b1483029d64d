"""Files are written whole or not at all, and where the person meant."""

import os
import stat

import pytest

from leangen.errors import StorageError
from leangen.files import atomic_file, write_atomic

posix = pytest.mark.skipif(os.name != "posix", reason="POSIX file modes, links and pipes")


def test_a_failure_leaves_what_was_there_and_nothing_else(tmp_path):
    path = tmp_path / "a.csv"
    write_atomic(path, b"old")
    with pytest.raises(KeyError), atomic_file(path) as file:
        file.write(b"new")
        raise KeyError
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_folder_is_no_file(tmp_path):
    with pytest.raises(StorageError, match=r"cannot write .*: Is a directory"):
        write_atomic(tmp_path, b"x")
    assert tmp_path.is_dir()


@posix
@pytest.mark.parametrize("there", [True, False])
def test_a_link_stays_a_link(tmp_path, there):
    target, link = tmp_path / "target.csv", tmp_path / "link.csv"
    if there:
        target.write_bytes(b"old")
    link.symlink_to(target)
    write_atomic(link, b"new")
    assert link.is_symlink() and target.read_bytes() == b"new"


@posix
def test_what_is_no_file_is_written_to_and_stays(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_atomic(pipe, b"through")
    assert os.read(reader, 100) == b"through"
    assert stat.S_ISFIFO(pipe.stat().st_mode)
    os.close(reader)


@posix
def test_the_mode_is_the_users(tmp_path):
    kept, made = tmp_path / "kept", tmp_path / "made"
    kept.touch()
    kept.chmod(0o640)
    before = os.umask(0o077)
    try:
        write_atomic(kept, b"x")
        write_atomic(made, b"x")
    finally:
        os.umask(before)
    assert [stat.S_IMODE(path.stat().st_mode) for path in (kept, made)] == [0o640, 0o600]
