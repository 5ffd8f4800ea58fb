"""One run from its configuration to its summary."""

import time
from pathlib import Path

from vpt.config import TrainConfig
from vpt.evaluation.pictures import draw_run
from vpt.evaluation.runner import evaluate
from vpt.pretrained import digest
from vpt.training.loop import Trainer


def train(config: TrainConfig, folder: str | Path) -> float:
    """Train (or go on), answer the test split, leave a summary and pictures in `folder`. Returns the accuracy."""
    folder = Path(folder)
    trainer = Trainer(config, folder)
    started = time.perf_counter()
    trainer.fit()
    took = time.perf_counter() - started
    weights = digest(folder)
    summary = evaluate(trainer.parts, config, folder / "predictions", weights=weights, limit=_limit(config))
    trainer.finish(summary | {"steps": trainer.progress.step, "seconds_of_training_in_this_process": took})
    print(f"accuracy {summary['accuracy']:.4f} on {summary['questions']} questions; see {folder}/summary.json")
    for path in draw_run(folder):
        print(f"  {path}")
    return summary["accuracy"]


def _limit(config: TrainConfig) -> int | None:
    limits = [n for n in (config.data.limit, config.training.final_questions) if n is not None]
    return min(limits) if limits else None
