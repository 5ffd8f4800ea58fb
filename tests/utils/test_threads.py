"""Threads follow the affinity mask and the quotas of control groups."""

import os
from pathlib import Path

import pytest
import torch

from vpt.utils import threads
from vpt.utils.threads import set_threads, usable_cpus

MINE = len(os.sched_getaffinity(0))


@pytest.mark.parametrize(("groups", "files", "cpus"), [
    ("0::/a/b", {"a/b/cpu.max": "max 100000", "a/cpu.max": "50000 100000"}, 0.5),  # the outer group's
    ("0::/", {"cpu.max": "20000 10000"}, 2),
    ("0::/docker/x", {"cpu.max": "30000 100000"}, 0.3),  # the host's name of a group that is the root here
    ("4:memory:/m\n3:cpu,cpuacct:/c\n0::/", {"cpu,cpuacct/c/cpu.cfs_quota_us": "150000",
                                           "cpu,cpuacct/c/cpu.cfs_period_us": "100000"}, 1.5),
    ("3:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, MINE),
    ("0::/", {"cpu.max": "nonsense"}, MINE),
    ("0::/", {}, MINE),
    (None, {}, MINE),
])  # fmt: skip
def test_quotas_of_control_groups(tmp_path: Path, groups, files, cpus):
    for name, text in files.items():
        file = tmp_path / "sys/fs/cgroup" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    if groups is not None:
        (tmp_path / "proc/self").mkdir(parents=True)
        (tmp_path / "proc/self/cgroup").write_text(f"{groups}\n")
    assert usable_cpus(tmp_path) == min(cpus, MINE)


def test_the_affinity_mask():
    mask = os.sched_getaffinity(0)
    os.sched_setaffinity(0, [min(mask)])
    try:
        assert usable_cpus() == 1
    finally:
        os.sched_setaffinity(0, mask)


@pytest.mark.parametrize(("asked", "processes", "load", "chosen", "busy"), [
    (None, 1, 0.1, 6, False), (None, 1, 2.0, 6, True), (None, 2, 2.0, 3, False), (None, 16, 9.0, 1, False),
    (4, 1, 9.0, 4, False),
])  # fmt: skip
def test_how_many_and_what_is_said(monkeypatch, asked, processes, load, chosen, busy):
    """Of seven cores six may be used; a busy machine is told, with the key."""
    monkeypatch.setattr(threads, "usable_cpus", lambda: 6.5)
    monkeypatch.setattr(threads, "_torch_default", lambda: 8)
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    monkeypatch.setattr(os, "getloadavg", lambda: (load, 0.0, 0.0))
    before = torch.get_num_threads()
    try:
        said = set_threads(asked, processes=processes)
        assert torch.get_num_threads() == chosen and said.startswith(f"threads: {chosen}")
        assert ("threads=N" in said) == (asked is None) and ("try threads=1" in said) == busy
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize(("cpus", "chosen"), [(4.0, 3), (2.0, 1), (1.0, 1)])
def test_some_are_spared_for_others(monkeypatch, cpus, chosen):
    monkeypatch.setattr(threads, "usable_cpus", lambda: cpus)
    monkeypatch.setattr(threads, "_torch_default", lambda: 8)
    before = torch.get_num_threads()
    try:
        set_threads(None, spare=1)
        assert torch.get_num_threads() == chosen
    finally:
        torch.set_num_threads(before)
