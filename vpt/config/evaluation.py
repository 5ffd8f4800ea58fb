"""Settings of `eval.py`, and where frozen weights are now for every program that reads a checkpoint."""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.fields import MISSING, bounded, choice, optional_choice
from vpt.config.schema import TrackingConfig


@dataclass
class WeightsPath:
    path: str | None = None  # where its frozen weights are now, if they were moved since the training


@dataclass
class EvalDataConfig:
    limit: int | None = bounded(None, low=1)  # the first n questions
    repeats: int = bounded(1, low=1)  # answers to each question, drawn apart; with more than one, accuracy is Avg@k
    root: str | None = None  # another folder of data
    max_length: int | None = bounded(None, low=1)  # tokens of a prompt
    metrics: list[str] | None = None  # of every source
    test: dict[str, Any] = field(default_factory=dict)  # only the sets named here, over the trained ones of these names
    on_error: str | None = optional_choice("raise", "skip")
    max_skipped_fraction: float | None = bounded(None, high=1.0)


@dataclass
class AblationConfig:
    target: str = MISSING  # a class of vpt/evaluation/ablations, or another like them
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class


@dataclass
class JudgeConfig:
    url: str | None = None  # of a server with the OpenAI chat format, up to /v1; null asks no judge
    model: str = "gpt-4o-2024-08-06"  # the paper's
    api_key_env: str = "OPENAI_API_KEY"  # the environment variable that holds the key, where the server wants one
    questions: int = bounded(1000, low=1)  # of each data set, the first ones
    workers: int = bounded(8, low=1)  # requests at a time
    retries: int = bounded(6)  # of a request that fails for a moment, each after a longer wait
    timeout: float = bounded(60.0)  # seconds
    cache: str = "outputs/judge.sqlite"  # replies, so that nothing is asked twice


@dataclass
class EvalConfig:
    """Settings of `eval.py`; null means as trained."""

    checkpoint: str = MISSING  # a run (its last checkpoint), a checkpoint, or an exported or published one
    name: str = "test"  # results go to RUN/eval/NAME
    baseline: str | None = None  # another run or checkpoint, answering the same questions, to compare with
    ablations: dict[str, AblationConfig] = field(default_factory=dict)
    judge: JudgeConfig = field(default_factory=JudgeConfig)
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda where there is one
    threads: int | None = bounded(None, low=1)  # of a process, on the CPU; null: one for each core that it may use
    pictures: bool = True  # the report, too
    tracking: TrackingConfig = field(default_factory=lambda: TrackingConfig(wandb=False))  # a W&B run of its own
    data: EvalDataConfig = field(default_factory=EvalDataConfig)
    generation: dict[str, Any] = field(default_factory=dict)  # keys of GenerationConfig, in place of the trained ones
    model: WeightsPath = field(default_factory=WeightsPath)
    encoder: dict[str, WeightsPath] = field(default_factory=dict)
