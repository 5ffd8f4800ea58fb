"""What a run says of itself while it trains: lines on the screen, a progress bar, `metrics.jsonl`, W&B."""

import json
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from tqdm import tqdm

from vpt.checkpoint.train_state import TrainState
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import World
from vpt.tracking import JSONLLogger, MetricLogger, MetricsLog, NoMetrics, NullLogger, build_tracker


class RunLogger:
    """Rank 0 keeps them; on all other processes nothing is said or written."""

    def __init__(self, config: TrainConfig, folder: Path, world: World) -> None:
        """Nothing is written before `open`."""
        self.config, self.folder, self.world = config, folder, world
        self.mirror: MetricLogger = NullLogger()
        self.metrics: MetricsLog = NoMetrics()

    def start(self, progress: TrainState, account: str, strategy: str) -> None:
        """Say what is about to be trained, and begin to write.

        Args:
            progress: where the run stands; learns the W&B run's id.
            account: the parameters, frozen and trained.
            strategy: on what it runs.
        """
        if not self.world.is_main:
            return
        training, step = self.config.training, progress.step
        self.folder.mkdir(parents=True, exist_ok=True)
        OmegaConf.save(OmegaConf.structured(self.config), self.folder / "config.yaml")
        print(account)
        print(f"  {strategy}, {training.precision}; batch of {training.batch_size} rows, {training.steps} steps")
        print(f"  {self.folder}: " + (f"goes on after step {step}" if step else "a new run"), flush=True)
        self.mirror = build_tracker(
            self.config.tracking, name=self.config.run_name, folder=self.folder, run_id=progress.wandb_id,
            settings=asdict(self.config),
        )  # fmt: skip
        progress.wandb_id = self.mirror.id
        self.metrics = JSONLLogger(self.folder / "metrics.jsonl", resumed_at=step)

    def progress_bar(self, done: int) -> tqdm:
        """The progress bar of a run that has taken `done` steps."""
        return tqdm(
            total=self.config.training.steps, initial=done, unit="step", dynamic_ncols=True, smoothing=0.05,
            disable=not self.world.is_main,
        )  # fmt: skip

    def update(self, bar: tqdm, *, loss: float, speed: float) -> None:
        """One step more; `speed` is in tokens a second."""
        bar.update()
        bar.set_postfix_str(f"loss {loss:.3f}, {speed:,.0f} tokens/s", refresh=False)

    def info(self, text: str) -> None:
        """A line above the progress bar."""
        if self.world.is_main:
            tqdm.write(text, file=sys.stderr)

    def log_metrics(self, metrics: dict[str, float], *, step: int) -> None:
        """Metrics of a step, counted from 1."""
        self.metrics.log(metrics, step=step)
        self.mirror.log(metrics, step=step)

    def log_summary(self, summary: dict[str, Any]) -> None:
        """Write `summary.json`."""
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1))
        self.mirror.log_summary(summary)

    def close(self) -> None:
        """The run is over, or stops here."""
        self.mirror.close()
