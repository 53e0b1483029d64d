"""A bundle packed into one file comes out as it was; what is no whole bundle is refused."""

import io
import pickle
import tarfile

import numpy as np
import pytest
from flow_models import coupling_info, flow_state

from leangen import exporters, probe, verification
from leangen.errors import SourceError
from leangen.exporters import pzflow


@pytest.fixture(scope="module")
def bundle(tmp_path_factory):
    folder = tmp_path_factory.mktemp("flow")
    path = folder / "tiny.pzflow.pkl"
    path.write_bytes(pickle.dumps(flow_state([coupling_info()], 2)))
    return probe.attach(pzflow.export(path, folder / "bundle"))


def archive(path, contents):
    with tarfile.open(path, "w") as file:
        for name, content in contents.items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            file.addfile(member, io.BytesIO(content))
    return path


def contents(bundle):
    return {p.name: p.read_bytes() for p in bundle.path.iterdir()}


def test_what_is_packed_comes_out(bundle, tmp_path):
    packed = archive(tmp_path / "tiny.tar", contents(bundle))
    made = exporters.export(packed, tmp_path / "made", name="other")
    assert (made.name, made.family, made.config) == ("other", bundle.family, bundle.config)
    assert made.files == bundle.files
    assert made.source == bundle.source
    again = probe.attach(made)  # it keeps the probe that it came with
    assert again.digest == made.digest
    lines = list(verification.verify(made))
    assert [line.split(":")[0] for line in lines[-2:]] == ["graph log_prob", "graph sample"]


def test_a_damaged_or_a_dangerous_archive_is_refused(bundle, tmp_path):
    whole = contents(bundle)
    flipped = bytearray(whole["sample.onnx"])
    flipped[100] ^= 1
    missing = {name: content for name, content in whole.items() if name != "sample.onnx"}
    for bad, words in (
        (whole | {"sample.onnx": bytes(flipped)}, "has sha256"),
        (missing, "lacks 'sample.onnx'"),
        (whole | {"../elsewhere": b"x"}, "outside the destination"),
        ({"a.txt": b"nothing"}, "it has no leangen.json"),
    ):
        packed = archive(tmp_path / "bad.tar", bad)
        with pytest.raises(SourceError, match=f"bad.tar is not a whole bundle .*{words}"):
            exporters.export(packed, tmp_path / "made")
        assert not (tmp_path / "made").exists() and not (tmp_path.parent / "elsewhere").exists()
    (tmp_path / "no.tar").write_bytes(np.random.default_rng(0).bytes(2000))
    with pytest.raises(SourceError, match="no.tar is not a whole bundle"):
        exporters.export(tmp_path / "no.tar", tmp_path / "made")
