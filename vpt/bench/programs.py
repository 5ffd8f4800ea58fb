"""Programs that are measured from outside."""

import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def run_program(command: Sequence[str], output: Path, *, until: Callable[[], bool] | None = None) -> tuple[float, int]:
    """Run Python with these arguments to its end, or kill it once `until` says so.

    Returns the seconds, and the most bytes that the process held by itself; pages of mapped files, which the system
    takes back, are left out. What it prints is added to the file `output`. Raises RuntimeError where it fails.
    """
    started, peak = time.perf_counter(), 0
    with output.open("a") as file:
        program = subprocess.Popen([sys.executable, *command], cwd=ROOT, stdout=file, stderr=file)
    while program.poll() is None:
        peak = max(peak, _own_memory(program.pid))
        if until is not None and until():
            program.kill()
        time.sleep(0.05)
    if program.returncode not in (0, *([-signal.SIGKILL] if until else [])):
        raise RuntimeError(f"{' '.join(command)}\n{output.read_text()[-3000:]}")
    return time.perf_counter() - started, peak


def _own_memory(process: int) -> int:
    try:
        lines = Path(f"/proc/{process}/status").read_text().splitlines()
    except OSError:  # it has just ended
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("RssAnon")), 0)
