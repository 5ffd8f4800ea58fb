"""The configuration of reward learning, `rl`: a part of the tree in `vpt.config.schema`."""

from dataclasses import dataclass, field
from typing import Any

from vpt.config.fields import MISSING, bounded, choice

ALGORITHMS = ("grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo", "rft", "dpo")


@dataclass
class RewardConfig:
    target: str = MISSING  # a class of vpt/rl/rewards.py, or another like them, or a function of your own
    weight: float = bounded(1.0, low=float("-inf"))  # rewards are added up with their weights
    options: dict[str, Any] = field(default_factory=dict)  # arguments of the class, or of the function


@dataclass
class RLConfig:
    algorithm: str = choice("none", *ALGORITHMS)  # none: supervised; the others: vpt/rl/algorithms.py
    rewards: dict[str, RewardConfig] = field(default_factory=dict)  # what an answer is worth
    num_generations: int = bounded(8, low=2)  # rollouts of a prompt: a group
    temperature: float = bounded(1.0, low=0.01)  # that rollouts are drawn at
    steps_per_generation: int = bounded(1, low=1)  # steps that share out the rollouts of one draw
    num_iterations: int = bounded(1, low=1)  # times that rollouts are trained on before others are drawn
    epsilon: float = bounded(0.2, high=1.0)  # a ratio below 1 - epsilon is clipped
    epsilon_high: float | None = bounded(None)  # a ratio above 1 + epsilon_high is clipped; null: as epsilon
    delta: float | None = bounded(None, low=1.0)  # dual clip: the most that a ratio counts at a negative advantage
    beta: float = bounded(0.0)  # of the divergence from a reference, the model as it began; dpo: of its margin
    max_resamples: int = bounded(0)  # draws for other prompts in place of groups whose rewards are all equal
    mask_truncated_completions: bool = True  # answers cut off teach nothing, and count in no group
    share_prompts: bool = True  # False runs a prompt once for each of its rollouts: slower, the same
