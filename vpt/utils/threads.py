"""How many threads a process computes with on the CPU."""

import os
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import torch

from vpt.utils.control_groups import control_groups


def set_threads(asked: int | None, *, processes: int = 1, spare: int = 0) -> str:
    """Set with how many threads this process computes, and say how many, why, and by which key.

    By default as torch would (OMP_NUM_THREADS included), but no more than the CPUs that this process may use and that
    `processes` on this node share, `spare` of which are left to other threads where there are so many. The number is
    not found by trying: with another one, sums are rounded in another way, and a resumed run would not be the same to
    the last bit.
    """
    threads = asked or max(1, min(_torch_default(), int(usable_cpus()) // processes - spare))
    torch.set_num_threads(threads)
    said = f"threads: {threads}" + ("" if asked else " (threads=N sets another number)")
    load, cores = os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0, os.cpu_count() or 1
    if asked or threads == 1 or load + threads < cores + 0.7:  # a full core of others' work would be in the way
        return said
    return f"{said}; others keep {load:.1f} of {cores} cores busy, so that fewer may be much faster: try threads=1"


@cache
def _torch_default() -> int:
    return torch.get_num_threads()  # asked before anything here has set it


def usable_cpus(root: Path = Path("/")) -> float:
    """CPUs in the affinity mask of this process, or the time of fewer where a control group has a quota."""
    own = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return min([own, *(quota for group in control_groups("cpu", root) for quota in _quota(group))])


def _quota(group: Path) -> Iterator[float]:
    try:
        if (file := group / "cpu.max").is_file():
            time, period = file.read_text().split()
        else:
            time, period = ((group / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period"))
        if time not in ("max", "-1"):
            yield int(time) / int(period)
    except (OSError, ValueError):  # no quota here, or nothing that may be read
        return
