"""Programs of this repository as processes of their own, without waiting for torch and transformers to be imported."""

import os
import runpy
import sys
import tempfile
from pathlib import Path
from subprocess import CompletedProcess, TimeoutExpired

from helpers.multiprocess import FORKING

ROOT = Path(__file__).resolve().parent.parent.parent


class Program:
    """`python ARGUMENTS`, a script or `-m MODULE`, in the repository's folder, forked from a process that has imported
    what takes long. `environment`: what else it has there.
    """

    def __init__(self, *arguments: str, environment: dict[str, str] | None = None) -> None:
        self._folder = tempfile.TemporaryDirectory()
        self._files = [Path(self._folder.name) / name for name in ("stdout", "stderr")]
        self.process = FORKING.Process(
            target=_run, args=(arguments, self._files, {**os.environ, **(environment or {})})
        )
        self.process.start()

    @property
    def output(self) -> str:
        """What it has printed so far, errors last."""
        return "".join(file.read_text() for file in self._files if file.exists())

    def send_signal(self, number: int) -> None:
        """Send a signal."""
        assert self.process.pid is not None
        os.kill(self.process.pid, number)

    def wait(self, timeout: float = 300) -> CompletedProcess:
        """Its exit code and what it printed, once it has ended. Raises TimeoutExpired, and kills it."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            raise TimeoutExpired("", timeout, self.output)
        return CompletedProcess((), self.process.exitcode or 0, *(file.read_text() for file in self._files))


def run_program(*arguments: str) -> CompletedProcess:
    """A program, run to its end."""
    return Program(*arguments).wait()


def _run(arguments: tuple[str, ...], files: list[Path], environment: dict[str, str]) -> None:
    for descriptor, file in enumerate(files, start=1):
        os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT), descriptor)
    sys.stdout, sys.stderr = (os.fdopen(descriptor, "w", buffering=1, closefd=False) for descriptor in (1, 2))
    os.environ.clear()
    os.environ.update(environment)
    os.chdir(ROOT)
    is_module = arguments[0] == "-m"
    name, *rest = arguments[is_module:]
    sys.argv, sys.path[:0] = [name, *rest], [str(ROOT)]
    if is_module:
        runpy.run_module(name, run_name="__main__", alter_sys=True)
    else:
        runpy.run_path(name, run_name="__main__")
