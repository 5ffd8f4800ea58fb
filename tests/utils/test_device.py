"""What the process keeps of what it frees."""

import platform
import subprocess
import sys

import pytest

from conftest import ROOT
from vpt.utils.device import keep_freed_heap

GROWTH = """
import sys, torch
from pathlib import Path
from vpt.utils.device import keep_freed_heap
if sys.argv[1] == "keep":
    assert keep_freed_heap()
size = lambda: int(Path("/proc/self/statm").read_text().split()[0])  # pages of address space
torch.ones(1)
before = size()
blocks = [torch.ones(5 * 2**20) for _ in range(8)]  # 20 MB each
del blocks
print((size() - before) * 4096 / 2**20)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_freed_blocks_stay():
    grown = {
        how: float(
            subprocess.run([sys.executable, "-c", GROWTH, how], cwd=ROOT, capture_output=True, check=True).stdout
        )
        for how in ("keep", "return")
    }
    assert grown["keep"] > 150
    assert grown["return"] < 150


def test_another_library_is_left_alone(monkeypatch):
    monkeypatch.setattr("ctypes.CDLL", lambda name: object())
    assert not keep_freed_heap()
