"""`train.py` after its configuration has been checked: train, answer the test split, report."""

import math
import sys
import time
from pathlib import Path
from typing import Any

from vpt.checkpoint.load import load_pretrained, weights_digest
from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import weight_paths
from vpt.distributed.process_group import World, init_process_group
from vpt.distributed.strategy import NEEDS_GROUP
from vpt.estimate.fitting import check_memory
from vpt.evaluation.evaluator import evaluate
from vpt.evaluation.questions import check_test_records
from vpt.evaluation.summary import headline, metrics_of
from vpt.models.build import ModelBundle
from vpt.reporting.examples import save_examples
from vpt.reporting.figures import draw_run
from vpt.reporting.report import write_report
from vpt.reporting.wandb_media import report_media
from vpt.rl.rewards import RewardSum
from vpt.training.frozen_features import shared_features
from vpt.training.preemption import PreemptionHandler
from vpt.training.run_logger import RunLogger
from vpt.training.trainer import Trainer
from vpt.utils.device import choose_device, free_unreachable


def train(config: TrainConfig, folder: str | Path) -> float:
    """Train (or go on), answer the test split, leave a summary and pictures in `folder`. Returns the accuracy (NaN
    where nothing was asked).
    """
    metrics_of(config.data)  # a metric that does not exist, or lacks its package, ends the run before it begins
    if config.rl.algorithm != "none":
        RewardSum(config.rl.rewards)  # likewise
    folder = Path(folder)
    with init_process_group(device=config.device, always=config.strategy.kind in NEEDS_GROUP) as world:
        left_out = check_test_records(config, limit=_limit(config))  # of what is asked at the end
        if left_out and world.is_main:
            print(left_out)
        run_logger, seconds, exit_code = _fit(config, folder, world)
        free_unreachable()
        if not exit_code:
            with PreemptionHandler(deferred=False):  # all is saved, answers included
                weights = weights_digest(folder) if world.is_main else ""
                # The same way for whole and for sharded models
                bundle = load_pretrained(folder, device=config.device, paths=weight_paths(config))
                with shared_features(bundle, config):
                    summary = evaluate(
                        bundle, config, folder / "predictions", weights=weights, limit=_limit(config), world=world
                    )  # fmt: skip
    if exit_code:
        sys.exit(exit_code)
    if world.is_main:
        results = {"steps": config.training.steps, "seconds_of_training_in_this_process": seconds}
        _report(bundle, config, folder, run_logger, summary | results)
    return summary.get("accuracy", math.nan)


def _fit(config: TrainConfig, folder: Path, world: World) -> tuple[RunLogger, float, Any]:
    """Train to the last step; returns the open logger, seconds, and the exit code of a run that is asked to stop.

    Model and optimizer go out of scope, so that nothing holds the process group when it is taken down.
    """
    if (scarce := check_memory(config, world, choose_device(config.device))) and world.is_main:
        print(f"  memory: {scarce}")
    trainer = Trainer(config, folder, world)
    started, exit_code = time.perf_counter(), None
    try:
        trainer.fit()
    except SystemExit as stopped:
        exit_code = stopped.code
    return trainer.run_logger, time.perf_counter() - started, exit_code


def _report(
    bundle: ModelBundle, config: TrainConfig, folder: Path, run_logger: RunLogger, summary: dict[str, Any]
) -> None:  # fmt: skip
    """Write examples, `summary.json`, figures and `report.html`, and show them to W&B. Closes the run's log."""
    save_examples(bundle, config, folder / "predictions", limit=_limit(config))
    run_logger.log_summary(summary)
    print(f"{headline(summary)}; see {folder}/summary.json")
    if config.pictures:
        for path in (*draw_run(folder, config=config), write_report(folder, config=config)):
            print(f"  {path}")
        run_logger.log_media(report_media(folder, config=config))
    run_logger.close()


def _limit(config: TrainConfig) -> int | None:
    limits = [n for n in (config.data.limit, config.training.final_eval_questions) if n is not None]
    return min(limits) if limits else None
