"""Threads follow what the process may use: affinity, SMT siblings, cgroup quotas."""

import os

import pytest

from leangen import threads


def tree(tmp_path, siblings, quota=None, group="/leaf"):
    for cpu, pair in siblings.items():
        folder = tmp_path / f"sys/devices/system/cpu/cpu{cpu}/topology"
        folder.mkdir(parents=True)
        (folder / "thread_siblings_list").write_text(pair + "\n")
    (tmp_path / "proc/self").mkdir(parents=True)
    (tmp_path / "proc/self/cgroup").write_text(f"0::{group}\n")
    folder = tmp_path / f"sys/fs/cgroup{group}"
    folder.mkdir(parents=True)
    (folder / "cpu.max").write_text("max 100000\n")
    if quota:
        (folder.parent / "cpu.max").write_text(quota + "\n")
    return tmp_path


@pytest.fixture
def four_cpus(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2, 3})


def test_what_was_asked_for_wins(tmp_path):
    assert threads.choose(7, root=tmp_path) == (7, "asked for")


def test_hyper_threads_share_a_core(four_cpus, tmp_path):
    root = tree(tmp_path, {0: "0,2", 1: "1,3", 2: "0,2", 3: "1,3"})
    count, reason = threads.choose(None, root=root)
    assert count == 2
    assert "2 physical cores of 4 allowed CPUs" in reason


def test_a_parents_cgroup_quota_limits(four_cpus, tmp_path):
    root = tree(tmp_path, {cpu: str(cpu) for cpu in range(4)}, quota="150000 100000")
    count, reason = threads.choose(None, root=root)
    assert count == 1
    assert "quota of 1.5 CPUs" in reason


def test_a_quota_below_one_cpu_still_leaves_one_thread(four_cpus, tmp_path):
    root = tree(tmp_path, {cpu: str(cpu) for cpu in range(4)}, quota="20000 100000")
    assert threads.choose(None, root=root)[0] == 1


def test_a_bare_machine_counts_cpus(four_cpus, tmp_path):
    assert threads.choose(None, root=tmp_path)[0] == 4
