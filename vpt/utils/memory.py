"""How much memory a process can still get."""

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch

from vpt.utils.control_groups import control_groups

_LIMITS = {"memory.max": "anon", "memory.limit_in_bytes": "rss"}  # file of a group -> what counts, in its memory.stat


def available_memory(device: torch.device, root: Path = Path("/")) -> float:
    """Bytes that are free on a GPU; for the CPU, those that Linux can give without swapping, within the limits of
    control groups. Infinite where nothing says so.
    """
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    free = _numbers(root / "proc/meminfo").get("MemAvailable:", float("inf"))
    return min([free * 1024, *_left_in_groups(root)])


def _left_in_groups(root: Path) -> Iterator[float]:
    for group in control_groups("memory", root):
        for name, used in _LIMITS.items():
            try:
                yield int((group / name).read_text()) - _numbers(group / "memory.stat").get(used, 0.0)
            except (OSError, ValueError):  # no limit here ("max"), or nothing that may be read
                continue


def _numbers(file: Path) -> Mapping[str, float]:
    try:
        lines = (line.split() for line in file.read_text().splitlines())
        return {parts[0]: float(parts[1]) for parts in lines if len(parts) > 1}
    except (OSError, ValueError):
        return {}
