"""Console output, `metrics.jsonl` and W&B of a run while it trains."""

import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from vpt.checkpoint.train_state import TrainState
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import World
from vpt.tracking import JSONLLogger, MetricLogger, ReportMedia, build_tracker


class RunLogger:
    """Console output, progress bar, `metrics.jsonl`, `summary.json` and W&B of a run; a no-op except on rank 0."""

    def __init__(self, config: TrainConfig, folder: Path, world: World) -> None:
        """Opens no file; `start` does."""
        self.config, self.folder, self.world = config, folder, world
        self.loggers: Sequence[MetricLogger] = ()
        self._rollouts: JSONLLogger | None = None

    def start(self, state: TrainState, parameters: str, strategy: str) -> None:
        """Print what is about to be trained, write `config.yaml` and open the loggers. `state` gets W&B's run id."""
        if not self.world.is_main:
            return
        training, step = self.config.training, state.step
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
        print(parameters)
        image = self.config.data.image
        print(f"  images of {image.min_pixels:,} to {image.max_pixels:,} pixels, mean {image.mean}, std {image.std}")
        print(f"  {strategy}, {training.precision}; batch of {training.batch_size} rows, {training.steps} steps")
        print(f"  {self.folder}: " + (f"goes on after step {step}" if step else "a new run"), flush=True)
        tracker = build_tracker(
            self.config.tracking, name=self.config.run_name, folder=self.folder, run_id=state.wandb_id,
            settings=asdict(self.config),
        )  # fmt: skip
        state.wandb_id = tracker.id or state.wandb_id  # a resumed run may be without W&B for a while
        self.loggers = JSONLLogger(self.folder / "metrics.jsonl", resumed_at=step), tracker
        if self.config.rl.algorithm != "none":
            self._rollouts = JSONLLogger(self.folder / "rollouts.jsonl", resumed_at=step)

    def progress_bar(self, done: int) -> tqdm:
        """The progress bar of a run that has taken `done` steps."""
        return tqdm(
            total=self.config.training.steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=not self.world.is_main,
        )  # fmt: skip

    def update(self, bar: tqdm, *, loss: float, speed: float) -> None:
        """Advance the bar by a step; `speed` is in tokens a second."""
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def info(self, text: str) -> None:
        """Print a line above the progress bar."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        """Log metrics of a step, counted from 1."""
        for logger in self.loggers:
            logger.log(metrics, step=step)

    def log_rollouts(self, rollouts: Sequence[dict[str, Any]], *, step: int) -> None:
        """Some rollouts of a step, counted from 1, for `rollouts.jsonl`."""
        if self._rollouts is not None:
            for rollout in rollouts:
                self._rollouts.log(rollout, step=step)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Log results of the whole run."""
        for logger in self.loggers:
            logger.log_summary(summary)

    def log_media(self, media: ReportMedia) -> None:
        """Log the report of the run."""
        for logger in self.loggers:
            logger.log_media(media)

    def close(self) -> None:
        """Close all loggers: the run is over, or stops here."""
        for logger in (*self.loggers, *filter(None, [self._rollouts])):
            logger.close()
