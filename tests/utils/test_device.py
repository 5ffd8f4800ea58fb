"""What the process keeps of what it frees."""

import platform
import subprocess
import sys

import pytest

from conftest import ROOT
from vpt.utils.heap import keep_freed_heap, share_heap

GROWTH = """
import sys, torch
from pathlib import Path
from vpt.utils.heap import keep_freed_heap
if sys.argv[1] == "keep":
    assert keep_freed_heap()
size = lambda: int(Path("/proc/self/statm").read_text().split()[0])  # pages of address space
torch.ones(1)
before = size()
blocks = [torch.ones(5 * 2**20) for _ in range(8)]  # 20 MB each
del blocks
print((size() - before) * 4096 / 2**20)
"""


HEAPS = """
import ctypes, sys, threading
from vpt.utils.heap import share_heap
if sys.argv[1] == "share":
    assert share_heap()
started, ended = threading.Barrier(9), threading.Event()
def work():
    kept = bytearray(100_000)
    started.wait()
    ended.wait()
for _ in range(8):
    threading.Thread(target=work).start()
started.wait()
ctypes.CDLL(None).malloc_stats()  # to stderr, an "Arena N:" for each heap
ended.set()
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_threads_share_a_heap():
    said = {
        how: subprocess.run([sys.executable, "-c", HEAPS, how], cwd=ROOT, capture_output=True, check=True).stderr
        for how in ("share", "apart")
    }
    assert {how: text.count(b"Arena ") > 1 for how, text in said.items()} == {"share": False, "apart": True}


RESIDENT = """
import torch
from pathlib import Path
from vpt.utils.device import free_unreachable
from vpt.utils.heap import keep_freed_heap
assert keep_freed_heap()
size = lambda: int(Path("/proc/self/statm").read_text().split()[1])  # pages in memory
blocks = [torch.ones(2**20) for _ in range(40)]  # 4 MB each
full = size()
del blocks[:-1]  # the last one is above the others in the heap
kept = size()
free_unreachable()
print(*((full - now) * 4096 / 2**20 for now in (kept, size())))
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="another C library")
def test_what_was_kept_is_given_back():
    said = subprocess.run([sys.executable, "-c", RESIDENT], cwd=ROOT, capture_output=True, check=True).stdout
    kept, given_back = map(float, said.split())
    assert kept < 20 and given_back > 120


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
    assert not keep_freed_heap() and not share_heap()
