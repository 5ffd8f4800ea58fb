"""Choosing the next token: greedy, or drawn by temperature, top-k and top-p."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import LogitsProcessor, TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper


@dataclass(frozen=True)
class Sampling:
    """Choice of the next token from its logits: greedy, or by temperature, top-k and top-p.

    Attributes:
        temperature: 0 takes the likeliest token; what follows then has no effect.
        top_k: the k likeliest tokens only; 0 takes all.
        top_p: the likeliest tokens that together have probability p; 1 takes all.
        seed: a row draws from a generator of its own, made of this seed and the row's number, so that what it draws
            does not depend on its batch.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def rng_for(self, number: int) -> np.random.Generator:
        """The generator that row `number` draws from."""
        return np.random.default_rng([self.seed, number])

    def sample(self, logits: Tensor, rngs: Sequence[np.random.Generator]) -> list[int]:
        """One token for each row of [n, vocabulary], -inf where a token is forbidden."""
        if not self.temperature:
            return logits.argmax(dim=-1).tolist()
        unused: torch.LongTensor = None  # type: ignore[assignment]  # the tokens so far: these three ignore them
        for warper in self._warpers():  # one after the other: a LogitsProcessorList inspects their signatures each time
            logits = warper(unused, logits)  # type: ignore[arg-type]
        cumulative = logits.double().softmax(dim=-1).cumsum(dim=-1)
        # In the order of the vocabulary, so that nearly equal tokens cannot change places. In (0, 1]: a token of
        # probability 0 is never the first to reach a point.
        points = torch.tensor([[1 - one.random()] for one in rngs], dtype=torch.float64, device=logits.device)
        return torch.searchsorted(cumulative, points * cumulative[:, -1:]).flatten().tolist()

    def _warpers(self) -> list[LogitsProcessor]:
        warpers: list[LogitsProcessor] = [TemperatureLogitsWarper(self.temperature)]
        if self.top_k:
            warpers.append(TopKLogitsWarper(self.top_k))
        if self.top_p < 1:
            warpers.append(TopPLogitsWarper(self.top_p))
        return warpers
