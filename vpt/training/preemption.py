"""Signals that ask a run to stop: Ctrl-C, SIGTERM, and those by which SLURM announces that it takes the node away."""

import signal
import sys
from types import FrameType
from typing import NoReturn

from tqdm import tqdm

from vpt.errors import INTERRUPTED, PREEMPTED

EXIT_CODES = {
    signal.SIGINT: INTERRUPTED,
    **dict.fromkeys((signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2), PREEMPTED),
}


class PreemptionHandler:
    """A context in which such signals are noted instead of ending the process.

    Attributes:
        code: the exit code that the signal stands for; 0 while none has come.
    """

    def __init__(self, *, deferred: bool = True) -> None:
        """`deferred`: the caller reads `code`; otherwise the process exits with it at once."""
        self.code, self.deferred = 0, deferred
        self._number: int | None = None

    def __enter__(self) -> "PreemptionHandler":
        self._before = {number: signal.signal(number, self._note) for number in EXIT_CODES}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def exit(self, code: int) -> NoReturn:
        """Exit with `code`, after the handler that the signal had before (submitit's queues the job again)."""
        if self._number is not None and self._number != signal.SIGINT:
            before = self._before[signal.Signals(self._number)]
            if callable(before):
                before(self._number, None)
        sys.exit(code)

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self.deferred and self.code and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.code, self._number = EXIT_CODES[signal.Signals(number)], number
        if not self.deferred:
            self.exit(self.code)
        again = "; Ctrl-C again stops at once" if number == signal.SIGINT else ""
        tqdm.write(f"{signal.Signals(number).name}: stopping after this step{again}", file=sys.stderr)
