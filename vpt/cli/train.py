"""One run from its configuration to its summary."""

import time
from pathlib import Path

from vpt.checkpoint.load import load_pretrained, weights_digest
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import init_process_group
from vpt.distributed.strategy import FSDP, NEEDS_GROUP
from vpt.evaluation.evaluator import evaluate
from vpt.evaluation.summary import metrics_of
from vpt.models.build import ModelBundle
from vpt.reporting.examples import save_examples
from vpt.reporting.figures import draw_run
from vpt.reporting.report import write_report
from vpt.reporting.wandb_media import report_media
from vpt.training.frozen_features import shared_features
from vpt.training.preemption import PreemptionHandler
from vpt.training.trainer import Trainer


def train(config: TrainConfig, folder: str | Path) -> float:
    """Train (or go on), answer the test split, leave a summary and pictures in `folder`. Returns the accuracy."""
    metrics_of(config.data)  # a metric that does not exist, or lacks its package, ends the run before it begins
    folder = Path(folder)
    with init_process_group(device=config.device, always=config.strategy.kind in NEEDS_GROUP) as world:
        trainer = Trainer(config, folder, world)
        started = time.perf_counter()
        trainer.fit()
        took = time.perf_counter() - started
        with PreemptionHandler(
            deferred=False
        ):  # all is saved, and answers that have been given are not asked for again
            parts, weights = _whole(trainer), weights_digest(folder) if world.is_main else ""
            with shared_features(parts, config.data):
                summary = evaluate(
                    parts, config, folder / "predictions", weights=weights, limit=_limit(config), world=world
                )  # fmt: skip
        if world.is_main:
            save_examples(parts, config, folder / "predictions", limit=_limit(config))
            steps = trainer.state.step
            trainer.run_logger.log_summary(summary | {"steps": steps, "seconds_of_training_in_this_process": took})
            print(f"accuracy {summary['accuracy']:.4f} on {summary['questions']} questions; see {folder}/summary.json")
            for path in (*draw_run(folder), write_report(folder, config=config)):
                print(f"  {path}")
            trainer.run_logger.mirror.log_media(report_media(folder, config=config))
            trainer.run_logger.close()
    return summary["accuracy"]


def _whole(trainer: Trainer) -> ModelBundle:
    """Parts that one process can answer with: a sharded model is read back from its last checkpoint."""
    if not isinstance(trainer.strategy, FSDP):
        return trainer.bundle
    trainer.free()
    return load_pretrained(trainer.folder, device=trainer.config.device)


def _limit(config: TrainConfig) -> int | None:
    limits = [n for n in (config.data.limit, config.training.final_eval_questions) if n is not None]
    return min(limits) if limits else None
