"""Benchmarks of the field through lmms-eval, and one table of them: `benchmarks.yaml` beside this file has them.

The table has each score with its interval, and the smallest difference between two models that its number of questions
can show: found in 80 of 100 comparisons, at a level of 5 %, were the two models' answers independent.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from vpt.errors import ConfigError, require
from vpt.evaluation.statistics import Ratio, estimates, smallest_difference_unpaired
from vpt.utils.table import Range, Table

PRESET = Path(__file__).with_suffix(".yaml")
SCORES = ("score", "is_correct", "gpt_score")  # what lmms-eval's tasks call the score of one question


@dataclass(frozen=True)
class Benchmark:
    """One entry of the preset."""

    tasks: list[str]
    metric: str
    questions: int
    max_side: int
    max_length: int
    max_new_tokens: int
    cluster: str = ""


@dataclass(frozen=True)
class Scored:
    """The score of every question of a benchmark; `clusters` numbers those that are not independent alike."""

    scores: list[float]
    clusters: list[int]


@dataclass
class BenchmarksConfig:
    """What is asked, and how."""

    checkpoint: str | None = None
    url: str | None = None  # of a server of the OpenAI format, in place of a checkpoint
    name: str = "vpt"  # of the model, as that server calls it
    benchmarks: list[str] = field(default_factory=list)  # all where none is named
    action: str | None = None
    device: str = "auto"
    batch_size: int = 16
    limit: int | None = None  # questions of each task
    tasks: str | None = None
    out: str = "outputs/benchmarks.json"


def preset(path: Path = PRESET) -> dict[str, Benchmark]:
    """The benchmarks, by name."""
    read: Any = OmegaConf.to_container(OmegaConf.load(path))
    return {name: Benchmark(**values) for name, values in read.items()}


def run(config: BenchmarksConfig) -> dict[str, Scored]:
    """The score of every question of each benchmark, answered through lmms-eval's own runner."""
    evaluator = require("lmms_eval.evaluator", "lmms", "running benchmarks")
    tasks = require("lmms_eval.tasks", "lmms", "running benchmarks")
    known, scored = preset(), {}
    for name in config.benchmarks or [*known]:
        chosen = known[name]
        manager = tasks.TaskManager(
            include_path=config.tasks, include_defaults=config.tasks is None, model_name="vpt"
        )  # fmt: skip
        results = evaluator.simple_evaluate(
            **_answerer(config, chosen), tasks=chosen.tasks, batch_size=config.batch_size, limit=config.limit,
            task_manager=manager, log_samples=True, bootstrap_iters=0,
            gen_kwargs=f"max_new_tokens={chosen.max_new_tokens}",
        )  # fmt: skip
        samples = [sample for found in results["samples"].values() for sample in found]
        scored[name] = Scored(
            [score_of(sample, chosen.metric) for sample in samples], clusters_of(samples, chosen.cluster)
        )
    return scored


def _answerer(config: BenchmarksConfig, chosen: Benchmark) -> dict[str, str]:
    """lmms-eval's arguments for who answers."""
    if config.url is not None:
        return {"model": "openai", "model_args": f"model={config.name},base_url={config.url},api_key=none"}
    arguments = {"checkpoint": config.checkpoint, "device": config.device, "action": config.action,
                 "max_side": chosen.max_side, "max_length": chosen.max_length}  # fmt: skip
    return {"model": "vpt", "model_args": ",".join(f"{k}={v}" for k, v in arguments.items() if v is not None)}


def score_of(sample: Mapping[str, Any], metric: str) -> float:
    """The score that a task gave one question, plain or among what else it noted. Raises ConfigError for none."""
    found = sample.get(metric)
    if isinstance(found, Mapping):
        found = next((found[key] for key in SCORES if key in found), None)
    if not isinstance(found, bool | int | float):
        raise ConfigError(f"lmms-eval's task gives no score called {metric}; mend {PRESET}")
    return float(found)


def clusters_of(samples: Sequence[Mapping[str, Any]], field: str) -> list[int]:
    """Equal numbers for questions whose row of the data has the same in this field; without it each is alone."""
    keys = [sample.get("doc", {}).get(field, number) for number, sample in enumerate(samples)]
    numbers = {key: number for number, key in enumerate(dict.fromkeys(keys))}
    return [numbers[key] for key in keys]


def table(scored: Mapping[str, Scored]) -> Table:
    """A row for each benchmark."""
    known, rows = preset(), []
    for name, found in scored.items():
        scores, clusters = found.scores, np.array(found.clusters)
        (estimate,) = estimates({name: Ratio.mean(scores)}, clusters).values()
        rows.append((name, known[name].metric, estimate.value, Range(estimate.low, estimate.high), len(scores),
                     known[name].questions, smallest_difference_unpaired(scores, clusters)))  # fmt: skip
    columns = ["benchmark", "metric", "score", "95% interval", "asked", "of", "smallest difference"]
    return Table(columns, rows, {"score": ".4f", "95% interval": ".4f", "smallest difference": ".4f"})
