"""`hf:org/name` against a fake hub on loopback: the right file is chosen, pinned and exported."""

import hashlib
import json
import os
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

import pytest
from store_fakes import quantize

from leangen import hub
from leangen.catalog import HubFiles
from leangen.errors import ChecksumError, SourceError
from leangen.store import Store

pytest.importorskip("huggingface_hub", reason="the extra `hub` is not installed")

COMMIT = "c0ffee" * 6 + "beef"
GGUF = b"GGUF" + b"weights" * 5000


class FakeHub:
    """Repositories by name, each a mapping of file to bytes; `gated` ones answer 403."""

    def __init__(self, repos):
        self.repos, self.lies, self.asked = repos, {}, []
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_HEAD(self):
                self.do_GET(body=False)

            def do_GET(self, body=True):
                path = unquote(urlsplit(self.path).path)
                outer.asked.append((self.command, path))
                status, headers, data = outer.answer(path)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                if body:
                    self.wfile.write(data)

            def log_message(self, *args):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"

    def answer(self, path):
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            repo, revision = "/".join(parts[2:4]), "/".join(parts[5:]) or "main"
            if repo not in self.repos:
                return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
            if revision not in ("main", "v1", COMMIT):
                return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
            if repo == "org/gated":
                return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
            return 200, {"Content-Type": "application/json"}, self.info(repo)
        if len(parts) < 5 or parts[2] != "resolve":
            return 404, {}, b""
        repo, commit, file = "/".join(parts[:2]), parts[3], "/".join(parts[4:])
        data = self.repos[repo][file]
        etag = f'"{hashlib.sha256(data).hexdigest()}"'
        return 200, {"ETag": etag, "X-Repo-Commit": commit, "Accept-Ranges": "bytes"}, data

    def info(self, repo):
        siblings = [
            {
                "rfilename": file,
                "size": len(data),
                "lfs": {
                    "size": len(data),
                    "sha256": self.lies.get(file, hashlib.sha256(data).hexdigest()),
                    "pointerSize": 130,
                },
            }
            for file, data in self.repos[repo].items()
        ]
        info = {"id": repo, "sha": COMMIT, "siblings": siblings, "tags": [], "private": False}
        return json.dumps(info | {"cardData": {"license": "apache-2.0"}}).encode()


REPOS = {
    "org/chat": {
        "README.md": b"#",
        "chat-Q8_0.gguf": b"GGUF8",
        "chat-Q4_K_M.gguf": GGUF,
        "mmproj-F16.gguf": b"GGUF",
    },
    "org/voice": {"en.onnx": b"onnx", "en.onnx.json": b"{}"},
    "org/voices": {f"{name}.onnx{end}": b"{}" for name in "abc" for end in ("", ".json")},
    "org/torch": {"pytorch_model.bin": b"x", "config.json": b"{}"},
    "org/saved": {
        "onnx/model.safetensors": b"x",
        **{f"model-0000{i}-of-00002.safetensors": b"x" for i in (1, 2)},
        **dict.fromkeys(("config.json", "tokenizer.json", "README.md"), b"{}"),
    },
    "org/shards": {"m-00001-of-00002.gguf": b"x", "m-00002-of-00002.gguf": b"x"},
    "org/gated": {"m.gguf": b"x"},
}


@pytest.fixture
def fake():
    fake = FakeHub(REPOS)
    thread = threading.Thread(target=fake.server.serve_forever, args=(0.02,))
    thread.start()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()
    thread.join()


def test_a_gguf_of_the_preferred_type_is_chosen_and_pinned(fake):
    entry = hub.entry("hf:org/chat", endpoint=fake.url)
    assert entry.source == HubFiles(
        repo="org/chat",
        revision=COMMIT,
        members=("chat-Q4_K_M.gguf",),
        sha256={"chat-Q4_K_M.gguf": hashlib.sha256(GGUF).hexdigest()},
        size_bytes=len(GGUF),
        licence="apache-2.0",
    )
    assert (entry.family, entry.exporter) == ("language", "gguf")
    assert entry.aliases == {"int4": "gguf"}


def test_a_file_and_a_revision_can_be_named(fake):
    entry = hub.entry("hf:org/chat/chat-Q8_0.gguf@v1", endpoint=fake.url)
    assert entry.source.members == ("chat-Q8_0.gguf",) and entry.aliases == {}
    assert ("GET", "/api/models/org/chat/revision/v1") in fake.asked


def test_what_transformers_saved_comes_whole(fake):
    entry = hub.entry("hf:org/saved", endpoint=fake.url)
    weights = [f"model-0000{i}-of-00002.safetensors" for i in (1, 2)]
    assert entry.source.members == ("config.json", *weights, "tokenizer.json")
    assert (entry.exporter, list(entry.forms)) == ("transformers", ["fp32"])


def test_a_voice_comes_with_its_json(fake):
    entry = hub.entry("hf:org/voice", endpoint=fake.url)
    assert entry.source.members == ("en.onnx", "en.onnx.json")
    assert (entry.family, entry.exporter, list(entry.forms)) == ("flow", "piper", ["fp32"])


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("hf:org/torch", "no single model in org/torch: .*found pytorch_model.bin, config.json"),
        ("hf:org/voices", "name one of its files as hf:org/name/FILE: a.onnx, b.onnx, c.onnx"),
        ("hf:org/shards", "expected a .gguf in one part"),
        ("hf:org/chat/none.gguf", "org/chat holds no 'none.gguf'; name one .*chat-Q4_K_M.gguf"),
        ("hf:org/chat/README.md", "has, but leangen cannot read, 'README.md'"),
        ("hf:org/none", "the hub has no model org/none that you may see"),
        ("hf:org/chat@v9", "org/chat@v9 has no such revision"),
        ("hf:org/gated", "org/gated is gated: accept its terms"),
    ],
)
def test_what_cannot_be_used_is_said_with_what_there_is(fake, name, says):
    with pytest.raises(SourceError, match=says):
        hub.entry(name, endpoint=fake.url)


def test_files_arrive_side_by_side_with_progress(fake, tmp_path):
    seen = []
    source = hub.entry("hf:org/voice", endpoint=fake.url).source
    path = hub.fetch(
        source, tmp_path / "cache", endpoint=fake.url, progress=lambda *call: seen.append(call)
    )
    assert path.read_bytes() == b"onnx" and path.with_name("en.onnx.json").read_bytes() == b"{}"
    assert seen[-1] == (6, 6, "downloading org/voice/en.onnx")


def test_bytes_that_are_not_what_the_hub_states_are_removed(fake, tmp_path):
    fake.lies["chat-Q4_K_M.gguf"] = "0" * 64
    source = hub.entry("hf:org/chat", endpoint=fake.url).source
    with pytest.raises(ChecksumError, match=f"expected {'0' * 64} as the hub states"):
        hub.fetch(source, tmp_path, endpoint=fake.url)
    assert not list(tmp_path.rglob("*.gguf"))


DEAD = "http://127.0.0.1:9"


def test_a_hub_that_does_not_answer():
    with pytest.raises(SourceError, match="cannot get org/chat from the hub .*check the network"):
        hub.entry("hf:org/chat", endpoint=DEAD)


@pytest.mark.slow  # huggingface_hub retries for 23 s
def test_a_hub_that_went_away_between_listing_and_download(fake, tmp_path):
    source = hub.entry("hf:org/chat", endpoint=fake.url).source
    with pytest.raises(SourceError, match="cannot get org/chat@.* refused.*check the network"):
        hub.fetch(source, tmp_path, endpoint=DEAD)


PULL = """
import sys
from pathlib import Path
from store_fakes import bare, quantize
from leangen.store import Store
exporters = {"gguf": "store_fakes", "piper": "store_fakes"}
store = Store(exporters=exporters, quantize=quantize, probe=bare)
for ref in sys.argv[1:]:
    print(store.resolve(ref, notify=print).path)
"""


def run(code, *args, **env):
    here = Path(__file__).parent
    path = os.pathsep.join([str(here), str(here.parent), str(here.parent / "kernels")])
    return subprocess.run(
        [sys.executable, "-c", code, *args],
        env=os.environ | {"PYTHONPATH": path} | env,
        capture_output=True,
        text=True,
        check=False,
    )


def test_a_hub_model_is_pulled_into_the_store_and_found_again_offline(fake, tmp_path):
    """As a user sets it: HF_ENDPOINT in the environment of a new process."""
    home = tmp_path / "home"
    env = {"HF_ENDPOINT": fake.url, "LEANGEN_HOME": str(home), "HF_HOME": str(tmp_path / "hf")}
    done = run(PULL, "hf:org/chat:int4", "hf:org/chat:int8", **env)
    assert done.returncode == 0, done.stderr
    assert "hf:org/chat:int4: int4 is gguf: the published Q4_K_M weights" in done.stdout
    store = Store(home, quantize=quantize)
    bundle = store.resolve("hf:org/chat:int4")  # no hub is asked
    assert (bundle.name, bundle.scheme) == ("hf:org/chat", "gguf")
    assert bundle.graph("model").read_bytes() == GGUF
    assert (bundle.source["repo"], bundle.source["revision"]) == ("org/chat", COMMIT)
    row = store.listing()[-1]
    assert (row["name"], row["installed"]) == ("hf:org/chat", ["fp32", "gguf", "int8"])
    assert not (tmp_path / "hf" / "hub").exists()  # the cache is the store's
    assert len(store.collect_garbage()) > 0 and store.resolve("hf:org/chat:int8")
    store.remove("hf:org/chat")
    assert store.usage() == []


def test_without_huggingface_hub_the_extra_is_named(tmp_path):
    code = "import sys; sys.modules['huggingface_hub'] = None\n" + PULL
    done = run(code, "hf:org/chat", LEANGEN_HOME=str(tmp_path / "home"))
    assert "DependencyError: hf:org/chat needs huggingface_hub: `pip install 'leangen[hub]'`" in (
        done.stderr
    )


@pytest.mark.parametrize(
    ("file", "kind"),
    [
        ("SmolLM2-135M-Instruct.Q4_1.gguf", "Q4_1"),
        ("gemma-3-1b-it-qat-q4_0.gguf", "Q4_0"),
        ("Llama-3.2-1B-Instruct-IQ4_XS.gguf", "IQ4_XS"),
        ("tiny-fp16.gguf", "F16"),
        ("Q4_0/model.gguf", ""),
        ("Qwen3-0.6B.gguf", ""),
    ],
)
def test_the_type_is_read_from_the_file_name(file, kind):
    assert hub.gguf_kind(file) == kind
