"""Failures that do not end a run at once: records that cannot be used, steps without a finite loss and gradient.

Both are counted in `TrainState` (so that a resumed run counts on), named in `failures.jsonl`, and bounded. All
processes count the same and stop together.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from tqdm import tqdm

from vpt.checkpoint.train_state import TrainState
from vpt.config.schema import TrainConfig
from vpt.data.skipping import too_many
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.distributed.process_group import World
from vpt.errors import DataError, TrainingError, listed
from vpt.perception.batch import Batch
from vpt.tracking import JSONLLogger


class FailureLog:
    """Counts of a run's failures, on every process; `failures.jsonl` is written by rank 0.

    `last_good` is the state before the first of the non-finite steps in a row.
    """

    def __init__(self, folder: Path, world: World, state: TrainState, config: TrainConfig) -> None:
        """`state` is the run's own: its counts are kept up to date here."""
        self.path, self.world, self.state, self.config = folder / "failures.jsonl", world, state, config
        self.last_good = replace(state)
        self._file: JSONLLogger | None = None
        if self.path.exists():
            self._write([])  # drops lines after the step that the run resumes at

    def start_step(self) -> None:
        """Remember the state before a step, unless the step before was not finite."""
        if not self.state.consecutive_nonfinite:
            self.last_good = replace(self.state)

    def record_skipped(self, batches: Sequence[Batch], totals: GlobalCounts) -> None:
        """Note the records left out of a step. Raises DataError where these are too many of all so far."""
        if not totals.skipped:
            return
        names = self._gather([name for batch in batches for name in batch.skipped])
        self.state.skipped += totals.skipped
        self._write([{"skipped": name} for name in names])
        step, share, training = self.state.step + 1, self.config.data.max_skipped_fraction, self.config.training
        rows, complete = step * training.batch_size, step == training.steps
        if too_many(self.state.skipped, rows, share, complete=complete):
            raise DataError(
                f"{self.state.skipped} of the first {rows} records could not be used, more than "
                f"data.max_skipped_fraction={share} allows; {self.path} names them, the last is: {names[-1]}"
            )

    def record_nonfinite(self, batches: Sequence[Batch], *, loss: float, norm: float) -> None:
        """Note a step whose loss or gradient is not finite."""
        self.state.nonfinite_steps += 1
        self.state.consecutive_nonfinite += 1
        names = self._gather([name for batch in batches for name in batch.ids])
        self._write([{"lost": {"loss": str(loss), "grad_norm": str(norm)}, "records": names}])
        if self.world.is_main:
            step = f"step {self.state.step + 1}"
            tqdm.write(f"{step} is skipped: loss {loss}, gradient norm {norm}; records {listed(names)}")

    @property
    def limit_exceeded(self) -> bool:
        """More steps in a row were not finite than `training.max_nonfinite_steps`."""
        return self.state.consecutive_nonfinite > self.config.training.max_nonfinite_steps

    def error(self) -> TrainingError:
        """The error that ends a run after too many non-finite steps."""
        return TrainingError(
            f"the last {self.state.consecutive_nonfinite} steps in a row had no finite loss and gradient "
            f"(training.max_nonfinite_steps={self.config.training.max_nonfinite_steps}); {self.path} names their "
            "records. All checkpoints are from before them. Mend the records and type the same command to go on from "
            "the last one, or start another run from it: init_from=THIS_RUN run_name=OTHER optim.lr=LOWER"
        )

    def _gather(self, names: list[str]) -> list[str]:
        """Names from all ranks, in rank order."""
        return [name for text in self.world.all_gather_text("\0".join(names)) for name in text.split("\0") if name]

    def _write(self, lines: Sequence[dict]) -> None:
        if self.world.is_main:
            self._file = self._file or JSONLLogger(self.path, resumed_at=self.state.step)
            for line in lines:
                self._file.log(line, step=self.state.step + 1)
