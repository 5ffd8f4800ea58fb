"""Runs that are stopped by a signal after one of their steps."""

import pytest

from vpt.errors import PREEMPTED
from vpt.training.trainer import Trainer


def fit_until(trainer: Trainer, stop: int = 0) -> Trainer:
    """Train to the end, or until a signal after step `stop`, which ends the run there."""
    step = trainer.train_step

    def told(batches, number):
        trainer.preemption.code = PREEMPTED if number + 1 == stop else 0
        return step(batches, number)

    trainer.train_step = told
    if not stop:
        trainer.fit()
        return trainer
    with pytest.raises(SystemExit):
        trainer.fit()
    assert trainer.state.step == stop
    return trainer
