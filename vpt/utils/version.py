"""Version of the package and commit of the code that a run ran on."""

import subprocess
from functools import cache
from pathlib import Path

__version__ = "0.2.0"
ROOT = Path(__file__).resolve().parents[2]


@cache
def code_version() -> dict[str, str | bool]:
    """The package's version; in a checkout of its own also the commit, and whether files differ from it."""
    version: dict[str, str | bool] = {"vpt": __version__}
    if (ROOT / ".git").exists():
        commit, changed = _git("rev-parse", "HEAD"), _git("status", "--porcelain", "--untracked-files=no")
        if commit is not None and changed is not None:
            version |= {"commit": commit, "dirty": bool(changed)}
    return version


def _git(*arguments: str) -> str | None:
    """Output of a git command, or None where there is no git, or no commit."""
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
