"""What reward learning knows of the tokens of a batch of rollouts besides their labels."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor


@dataclass
class RolloutTokens:
    """The labelled tokens of rollouts: how they were drawn, and what they were worth.

    A label is a token that was drawn among more than one permitted token; M labels, R rollouts.

    Attributes:
        forbidden: [k, vocabulary] sets of tokens, True where a token could not be drawn.
        constraint: [M] which of these sets held when the label was drawn.
        rollout: [M] which rollout the label belongs to, ascending.
        advantages: [R] of the rollouts.
        log_probs: [M] of the labels when they were drawn, at the temperature, among the permitted tokens.
        ref_log_probs: [M] the same under the reference model, where there is one.
        temperature: by which logits are divided.
    """

    forbidden: Tensor
    constraint: Tensor
    rollout: Tensor
    advantages: Tensor
    log_probs: Tensor
    ref_log_probs: Tensor | None = None
    temperature: float = 1.0

    def map(self, move: Callable[[Tensor], Tensor]) -> "RolloutTokens":
        """Apply `move` to every tensor."""
        moved: Any = {name: move(value) for name, value in vars(self).items() if isinstance(value, Tensor)}
        return replace(self, **moved)

    def log_softmax(self, logits: Tensor, constraint: Tensor) -> Tensor:
        """Log-probabilities [n, vocabulary] of what could be drawn; -inf for forbidden tokens."""
        return (logits.masked_fill(self.forbidden[constraint], -torch.inf) / self.temperature).log_softmax(dim=-1)
