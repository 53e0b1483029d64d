"""What a receipt says of the machine and the process."""

from __future__ import annotations

import subprocess
import sys

import numpy as np

from leangen import host


def tree(root, machine_id="0123456789abcdef", boot_id="b00t"):
    if machine_id:
        (root / "etc").mkdir(parents=True)
        (root / "etc/machine-id").write_text(machine_id + "\n")
    (root / "proc/sys/kernel/random").mkdir(parents=True)
    (root / "proc/sys/kernel/random/boot_id").write_text(boot_id + "\n")
    return root


def test_the_id_is_stable_and_does_not_give_the_machine_id_away(tmp_path):
    first = host.host(root=tree(tmp_path / "a"))
    again = host.host(root=tree(tmp_path / "b", boot_id="other"))
    other = host.host(root=tree(tmp_path / "c", machine_id="fedcba9876543210"))
    assert first.id == again.id != other.id
    assert "0123456789abcdef" not in first.id
    assert (first.boot_id, again.boot_id, first.device) == ("b00t", "other", "cpu")


def test_without_a_machine_id_a_random_one_is_kept_in_home(tmp_path):
    root = tree(tmp_path / "root", machine_id="")
    home = tmp_path / "home"
    first = host.host(root=root, home=home)
    assert host.host(root=root, home=home).id == first.id
    assert host.host(root=root, home=tmp_path / "elsewhere").id != first.id


def test_without_any_place_the_id_holds_for_the_boot(tmp_path):
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    root = tree(tmp_path / "root", machine_id="")
    assert host.host(root=root, home=blocked).id == host.host(root=root).id
    assert host.host(root=tmp_path / "nothing").boot_id == "unknown"


def test_peak_memory_rises_with_use_and_is_in_bytes():
    before = host.peak_rss_bytes()
    block = np.ones(64 * 1024 * 1024, dtype=np.uint8)
    after = host.peak_rss_bytes()
    assert block.sum() == block.size
    assert before > 5e6
    assert 40e6 <= after - before <= 200e6 or before > 200e6


def test_versions_are_read_without_importing():
    code = (
        "import sys; from leangen import host; v = host.versions(); "
        "assert not {'onnxruntime', 'numpy', 'onnx'} & set(sys.modules); print(v['onnxruntime'])"
    )
    child = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert child.returncode == 0, child.stderr
    assert child.stdout[0].isdigit()
