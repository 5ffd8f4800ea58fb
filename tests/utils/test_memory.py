"""Memory that is left, as the machine and its control groups say."""

from pathlib import Path

import pytest
import torch

from vpt.utils.memory import available_memory

INFO = "MemTotal:  8000 kB\nMemAvailable:  5000 kB\n"


@pytest.mark.parametrize(("files", "left"), [
    ({"proc/meminfo": INFO}, 5000 * 1024),
    ({}, float("inf")),
    ({"proc/meminfo": INFO, "proc/self/cgroup": "0::/a/b", "sys/fs/cgroup/a/b/memory.max": "max",
      "sys/fs/cgroup/a/memory.max": "1000000", "sys/fs/cgroup/a/memory.stat": "anon 400000\nfile 500000"}, 600_000),
    ({"proc/meminfo": INFO, "proc/self/cgroup": "7:memory:/m", "sys/fs/cgroup/memory/m/memory.limit_in_bytes": "900",
      "sys/fs/cgroup/memory/m/memory.stat": "cache 700\nrss 100"}, 800),
    ({"proc/meminfo": INFO, "proc/self/cgroup": "0::/", "sys/fs/cgroup/memory.max": "nonsense"}, 5000 * 1024),
])  # fmt: skip
def test_available_memory(tmp_path: Path, files, left):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert available_memory(torch.device("cpu"), tmp_path) == left


def test_here():
    assert 1 << 20 < available_memory(torch.device("cpu")) < float("inf")
