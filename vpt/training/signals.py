"""What asks a run to stop: Ctrl-C, SIGTERM, and SIGUSR1, by which SLURM announces that it will take the node away."""

import signal
import sys
from types import FrameType

from tqdm import tqdm

from vpt.cli import INTERRUPTED, PREEMPTED

_EXIT_CODES = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: PREEMPTED, signal.SIGUSR1: PREEMPTED}


class Signals:
    """A context in which such signals are noted instead of ending the process.

    Attributes:
        code: the exit code that the signal stands for; 0 while none has come.
    """

    def __init__(self, *, patient: bool = True) -> None:
        """`patient`: wait for whoever looks at `code`; otherwise exit with it at once. Ctrl-C twice always does."""
        self.code, self.patient = 0, patient

    def __enter__(self) -> "Signals":
        self._before = {number: signal.signal(number, self._note) for number in _EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        code = _EXIT_CODES[signal.Signals(number)]
        if not self.patient:
            sys.exit(code)
        if self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code = code
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        tqdm.write(f"{signal.Signals(number).name}: stopping after this step{again}", file=sys.stderr)
