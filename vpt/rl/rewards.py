"""What a rollout is worth: rewards by dotted name, added up with their weights (`rl.rewards`)."""

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from inspect import isfunction, signature

import torch
from torch import Tensor

from vpt.config.rl import RewardConfig
from vpt.config.targets import REWARD, check_arguments, imported, locate
from vpt.errors import ConfigError, TrainingError
from vpt.evaluation.metrics import build_metrics
from vpt.evaluation.metrics.base import MeanScore
from vpt.generation.row_state import REPAIRED
from vpt.rl.rollouts import Rollout, looked


class Reward(ABC):
    """Something that a rollout is rewarded for. `options` of the configuration are its arguments."""

    @abstractmethod
    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        """One number for each rollout."""


class Correctness(Reward):
    """The score of the answer, from 0 to 1."""

    def __init__(self, metric: str = "exact_match") -> None:
        """`metric`: a name out of `vpt.evaluation.metrics`, or the dotted name of a class, that scores one answer."""
        [built] = build_metrics([metric], key="rl.rewards: metric")
        if not isinstance(built, MeanScore):
            raise ConfigError(f"rl.rewards: metric={metric} scores no single answer; exact_match, anls do")
        self.metric = built

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [self.metric.score(rollout.prediction) or 0.0 for rollout in rollouts]


class PerceptionCost(Reward):
    """Perceived visual tokens, as a share of those of the first look: a cost, so its weight is negative."""

    def __init__(self, *, only_correct: bool = False) -> None:
        """`only_correct`: a wrong answer costs nothing."""
        self.only_correct = only_correct

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [
            rollout.perceived_tokens / max(rollout.first_look_tokens, 1)
            if rollout.prediction.correct or not self.only_correct
            else 0.0
            for rollout in rollouts
        ]


class Malformed(Reward):
    """1 where a request for perception was malformed: its weight is negative."""

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [float(any(step.status == REPAIRED for step in rollout.prediction.trace)) for rollout in rollouts]


class PerceptionBonus(Reward):
    """1 where perception was asked for, and by default only where the answer is right (DeepEyes, arXiv 2505.14362)."""

    def __init__(self, *, kind: str | None = None, only_correct: bool = True) -> None:
        """`kind`: region or a re-encoder; any by default."""
        self.kind, self.only_correct = kind, only_correct

    def __call__(self, rollouts: Sequence[Rollout]) -> list[float]:
        return [
            float(looked(rollout, self.kind) and (rollout.prediction.correct or not self.only_correct))
            for rollout in rollouts
        ]


def build_reward(path: str, node: RewardConfig) -> Callable[[Sequence[Rollout]], Sequence[float]]:
    """The reward that a configuration names: a class, or a function of rollouts and its options."""
    function = imported(node.target)
    if not isfunction(function):
        check_arguments(path, node, REWARD, given=())
        return locate(node.target, f"{path}.target", REWARD)(**node.options)
    try:
        signature(function).bind([], **node.options)
    except TypeError as error:
        raise ConfigError(f"{path}.options={node.options} do not suit the function {node.target}: {error}") from None
    return partial(function, **node.options)


class RewardSum:
    """All rewards of a run."""

    def __init__(self, nodes: Mapping[str, RewardConfig]) -> None:
        """Raises ConfigError for a target that is no reward, or options that do not suit it."""
        if not nodes:
            raise ConfigError("rl.rewards is empty; type +rewards=[correct], or rl.rewards.NAME.target=YOUR.CLASS")
        self.parts: dict[str, tuple[float, Callable[[Sequence[Rollout]], Sequence[float]]]] = {}
        for name, node in nodes.items():
            self.parts[name] = (node.weight, build_reward(f"rl.rewards.{name}", node))

    def __call__(self, rollouts: Sequence[Rollout]) -> tuple[Tensor, dict[str, Tensor]]:
        """[n] what rollouts are worth, and each part of it by name, without its weight.

        Raises TrainingError where a reward gives the wrong number of values, or one that is not finite.
        """
        parts = {name: self._part(name, reward, rollouts) for name, (_, reward) in self.parts.items()}
        total = sum((weight * parts[name] for name, (weight, _) in self.parts.items()), torch.zeros(len(rollouts)))
        return total, parts

    def _part(self, name: str, reward: Callable, rollouts: Sequence[Rollout]) -> Tensor:
        values = reward(rollouts)
        if len(values) != len(rollouts):
            raise TrainingError(
                f"rl.rewards.{name} gave {len(values)} values for {len(rollouts)} rollouts; it must give one for each"
            )
        for value, rollout in zip(values, rollouts, strict=True):
            if not math.isfinite(value):
                raise TrainingError(
                    f"rl.rewards.{name} is {value} for {rollout.prediction.record}, answered "
                    f"{rollout.prediction.answer!r}; a reward must be a finite number"
                )
        return torch.tensor(values, dtype=torch.float32)
