"""Run torchrun with the exit codes and signals of the run itself.

    vpt launch --nproc-per-node 8 train.py +experiment=dino ...

It takes whatever torchrun takes. Torchrun alone exits with 1 whatever its processes exit with, dies of SIGUSR1 without
telling them, and gives them 30 seconds to save.
"""

from collections.abc import Sequence

from torch.distributed import run as torchrun
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

from vpt.training.preemption import EXIT_CODES

DEFAULTS = {
    "--signals-to-handle": ",".join(number.name for number in EXIT_CODES),
    "--shutdown-timeout": "900",  # seconds in which a step must end and all be saved
}


def main(arguments: Sequence[str]) -> int:
    """Run torchrun. Returns the exit code of the process that failed first, or of the signal that ended them all."""
    known = torchrun.get_args_parser()._option_string_actions  # the second option is younger than our oldest torch
    options = [f"{name}={value}" for name, value in DEFAULTS.items() if name in known]
    try:
        torchrun.main([*options, *arguments])
    except SignalException as told:
        return EXIT_CODES.get(told.sigval, 1)
    except ChildFailedError as failed:
        _, first = failed.get_first_failure()
        return first.exitcode if first.exitcode > 0 else 128 - first.exitcode
    return 0
