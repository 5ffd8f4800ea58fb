"""The control groups (cgroups) that limit this process: of containers, SLURM jobs, systemd."""

from collections.abc import Iterator
from pathlib import Path


def control_groups(controller: str, root: Path = Path("/")) -> Iterator[Path]:
    """Folders of the groups of a controller (`cpu`, `memory`) that this process is in, of version 2 and 1, inner ones
    first."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    for controllers, path in (line.split(":", 2)[1:] for line in lines):
        if controllers and controller not in controllers.split(","):
            continue
        base = root / "sys/fs/cgroup" / controllers
        folder = base / path.lstrip("/")
        for group in (folder, *folder.parents):
            yield group
            if group == base:
                break
