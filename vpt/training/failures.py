"""What goes wrong without ending a run at once: records that cannot be used, steps without a finite gradient.

Both are counted in the run's progress (so that a resumed run counts on), named in `failures.jsonl`, and bounded. All
processes count the same and stop together.
"""

from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path

from tqdm import tqdm

from vpt.checkpoint.train_state import TrainState
from vpt.config.schema import TrainConfig
from vpt.data.mixture import CYCLE
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.distributed.process_group import World
from vpt.errors import DataError, TrainingError
from vpt.perception.batch import Batch
from vpt.tracking import JSONLLogger

SHOWN = 5  # names in a message


class FailureLog:
    """The setbacks of a run; every process has one, rank 0's writes the file.

    `before` is the progress before the first of the steps that have been lost in a row.
    """

    def __init__(self, folder: Path, world: World, progress: TrainState, config: TrainConfig) -> None:
        """`progress` is the run's own: its counts are kept up to date here."""
        self.path, self.world, self.progress, self.config = folder / "failures.jsonl", world, progress, config
        self.last_good = replace(progress)
        if self.path.exists() and world.is_main:
            assert self._file  # what comes after the step that the run resumes at is dropped now

    @cached_property
    def _file(self) -> JSONLLogger:
        return JSONLLogger(self.path, resumed_at=self.progress.step)

    def start_step(self) -> None:
        """Remember the progress before a step, unless the one before it was lost."""
        if not self.progress.consecutive_nonfinite:
            self.last_good = replace(self.progress)

    def record_skipped(self, batches: Sequence[Batch], totals: GlobalCounts) -> None:
        """Note what the batches of a step lack. Raises DataError where that is too much of what the run has seen."""
        if not totals.skipped:
            return
        names = self._all([name for batch in batches for name in batch.skipped])
        self.progress.skipped += totals.skipped
        step, share = self.progress.step + 1, self.config.data.max_skipped_fraction
        self._write([{"skipped": name} for name in names])
        rows = step * self.config.training.batch_size
        if self.progress.skipped > share * max(rows, CYCLE):
            raise DataError(
                f"{self.progress.skipped} of the first {rows} records could not be used, data.max_skipped_fraction={share} "
                f"allows {share * max(rows, CYCLE):g}; {self.path} names them, the last is: {names[-1]}"
            )

    def record_nonfinite(self, batches: Sequence[Batch], *, loss: float, norm: float) -> None:
        """Note a step whose loss or gradient is not finite."""
        self.progress.nonfinite_steps += 1
        self.progress.consecutive_nonfinite += 1
        names = self._all([name for batch in batches for name in batch.ids])
        self._write([{"lost": {"loss": str(loss), "grad_norm": str(norm)}, "records": names}])
        if self.world.is_main:
            shown = ", ".join(names[:SHOWN]) + (f" and {len(names) - SHOWN} more" if len(names) > SHOWN else "")
            tqdm.write(f"step {self.progress.step + 1} is skipped: loss {loss}, gradient norm {norm}; records {shown}")

    @property
    def limit_exceeded(self) -> bool:
        """Whether more steps in a row were lost than `training.max_nonfinite_steps`."""
        return self.progress.consecutive_nonfinite > self.config.training.max_nonfinite_steps

    def error(self) -> TrainingError:
        """What to say where the run ends for too many lost steps."""
        return TrainingError(
            f"the last {self.progress.consecutive_nonfinite} steps in a row had no finite loss and gradient "
            f"(training.max_nonfinite_steps={self.config.training.max_nonfinite_steps}); {self.path} names their records. The "
            f"checkpoint of step {self.last_good.step} is from before them. Mend the records and type the same command, "
            "or start another run from it: init_from=THIS_RUN run_name=OTHER optim.lr=LOWER"
        )

    def _all(self, names: list[str]) -> list[str]:
        """Those of every process, by rank."""
        return [name for text in self.world.all_gather_text("\0".join(names)) for name in text.split("\0") if name]

    def _write(self, lines: Sequence[dict]) -> None:
        if self.world.is_main:
            for line in lines:
                self._file.log(line, step=self.progress.step + 1)
