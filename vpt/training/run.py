"""One run from its configuration to its summary."""

import time
from pathlib import Path

from vpt.build import Parts
from vpt.config import TrainConfig
from vpt.evaluation.pictures import draw_run
from vpt.evaluation.runner import evaluate
from vpt.features import shared_features
from vpt.pretrained import digest, load
from vpt.report.examples import keep_examples
from vpt.report.exhibits import exhibits
from vpt.report.page import write_report
from vpt.training.loop import Trainer
from vpt.training.signals import Signals
from vpt.training.strategy import GROUPED, Sharded
from vpt.world import joined


def train(config: TrainConfig, folder: str | Path) -> float:
    """Train (or go on), answer the test split, leave a summary and pictures in `folder`. Returns the accuracy."""
    folder = Path(folder)
    with joined(device=config.device, always=config.strategy.kind in GROUPED) as world:
        trainer = Trainer(config, folder, world)
        started = time.perf_counter()
        trainer.fit()
        took = time.perf_counter() - started
        with Signals(patient=False):  # all is saved, and answers that have been given are not asked for again
            parts, weights = _whole(trainer), digest(folder) if world.main else ""
            with shared_features(parts, config.data):
                summary = evaluate(
                    parts, config, folder / "predictions", weights=weights, limit=_limit(config), world=world
                )  # fmt: skip
        if world.main:
            keep_examples(parts, config, folder / "predictions", limit=_limit(config))
            steps = trainer.progress.step
            trainer.books.summarise(summary | {"steps": steps, "seconds_of_training_in_this_process": took})
            print(f"accuracy {summary['accuracy']:.4f} on {summary['questions']} questions; see {folder}/summary.json")
            for path in (*draw_run(folder), write_report(folder, config=config)):
                print(f"  {path}")
            trainer.books.mirror.show(exhibits(folder, config=config))
            trainer.books.close()
    return summary["accuracy"]


def _whole(trainer: Trainer) -> Parts:
    """Parts that one process can answer with: a sharded model is read back from its last checkpoint."""
    if not isinstance(trainer.strategy, Sharded):
        return trainer.parts
    trainer.release()
    return load(trainer.folder, device=trainer.config.device)


def _limit(config: TrainConfig) -> int | None:
    limits = [n for n in (config.data.limit, config.training.final_questions) if n is not None]
    return min(limits) if limits else None
