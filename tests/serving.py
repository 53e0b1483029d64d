"""A server on a free port in a thread of this process, and one as a process of its own."""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import threading

import httpx
import tiny_bundles
import uvicorn

from leangen.serve import connections, run
from leangen.serve.options import Options
from leangen.serve.worker import Limits

NAMES = {
    "language": "tiny-text",
    "seq2seq/text": "tiny-translator",
    "seq2seq/transcription": "tiny-ears",
    "embedding": "tiny-vectors",
    "flow/speech": "tiny-voice",
    "flow/density": "tiny-flow",
    "diffusion": "tiny-image",
    "oneshot": "tiny-shot",
    "autoregressive/image": "tiny-pixels",
    "autoregressive/rows": "tiny-rows",
}


def bundles(folder):
    """NAME=PATH of a tiny bundle of every family."""
    return [
        f"{name}={tiny_bundles.BUILDERS[family](folder / name).path}"
        for family, name in NAMES.items()
    ]


@contextlib.contextmanager
def serving(models, **options):
    """(address, Server) of a server in a thread."""
    options.setdefault("limits", Limits(max_batch=4, context=128))
    options.setdefault("grace_s", 5.0)
    guarded, server = run.build(Options(models=models, port=0, threads=1, **options))
    config = uvicorn.Config(
        guarded, http=connections.Connection, ws="none", log_config=None, access_log=False
    )
    listener = run._listen(uvicorn.Config(guarded, host="127.0.0.1", port=0))
    web = uvicorn.Server(config)
    thread = threading.Thread(target=web.run, args=([listener],))
    thread.start()
    address = f"http://127.0.0.1:{listener.getsockname()[1]}"
    try:
        wait_until_ready(address)
        yield address, server
    finally:
        web.should_exit = True
        thread.join()
        listener.close()


@contextlib.contextmanager
def process(models, home, *options):
    """(address, Popen) of `leangen serve` as a process."""
    command = [sys.executable, "-m", "leangen", "serve", *models, "--port", "0", *options]
    child = subprocess.Popen(
        command,
        env=os.environ | {"LEANGEN_HOME": str(home)},
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        for line in child.stderr:
            if line.startswith("serving "):
                break
        else:
            raise AssertionError("the server ended before it served")
        address = line.split(" at ")[1].split(",")[0]
        threading.Thread(target=child.stderr.read, daemon=True).start()
        wait_until_ready(address)
        yield address, child
    finally:
        child.kill()
        child.wait()
        child.stderr.close()


def wait_until_ready(address):
    """Return when the server answers."""
    transport = httpx.HTTPTransport(retries=20, verify=False)  # there is no TLS here to set up
    with httpx.Client(transport=transport, trust_env=False) as client:
        client.get(f"{address}/ready", timeout=20).raise_for_status()
