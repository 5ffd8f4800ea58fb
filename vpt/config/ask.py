"""The keys of `vpt ask`."""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.evaluation import WeightsPath
from vpt.config.fields import MISSING, bounded, choice


@dataclass
class AskDataConfig:
    max_length: int | None = bounded(None, low=1)  # tokens that image and question may have
    action_prompt: bool | None = None  # whether the sentence that asked for perception in training follows the question


@dataclass
class AskConfig:
    """Settings of `vpt ask`; null means as trained."""

    checkpoint: str = MISSING  # as of eval.py
    out: str | None = None  # the picture
    action: str | None = None  # short for generation.action
    device: str = choice("auto", "cpu", "cuda")  # auto: cuda where there is one
    data: AskDataConfig = field(default_factory=AskDataConfig)
    generation: dict[str, Any] = field(default_factory=dict)  # keys of GenerationConfig, in place of the trained ones
    model: WeightsPath = field(default_factory=WeightsPath)
    encoder: dict[str, WeightsPath] = field(default_factory=dict)
