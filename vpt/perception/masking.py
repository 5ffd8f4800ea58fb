"""Masking between the inner passes (paper section 3.4): the question and image are hidden from the answer.

`para_mask_ratio` of the rows that hold a re-encoding action are masked, in training only. The draw belongs to the
sample, not to the batch, so it does not depend on how batches fall: it is a function of the run's seed, the sample and
the epoch. `draw="batch"` is as upstream does, one draw for a whole batch, in evaluation too.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from vpt.perception.batch import Row, Span
from vpt.perception.segments import MaskMode

# para_mask_id -> paragraphs that are hidden; 0 is the system prompt, 1 the first user turn
PARAGRAPHS: dict[int, tuple[int, ...]] = {0: (), 1: (1,), 2: (1, 3)}


@dataclass(frozen=True)
class Masking:
    """The settings of `conf/masking`."""

    para_mask_id: int = 0
    para_mask_ratio: float = 0.0
    mode: MaskMode = "zero"
    draw: Literal["sample", "batch"] = "sample"

    def spans(self, row: Row) -> tuple[Span, ...]:
        """The spans of `row` that would be hidden: none unless it holds a re-encoding action."""
        if not row.actions:
            return ()
        chosen = PARAGRAPHS[self.para_mask_id]
        return tuple(row.paragraphs[number] for number in chosen if number < len(row.paragraphs))

    def selects(self, *, seed: int, key: tuple[int, ...], training: bool) -> bool:
        """Whether the draw that belongs to `key` (a sample, or a batch where `draw` is `batch`) falls on masking."""
        if not self.para_mask_id or not (training or self.draw == "batch"):
            return False
        return bool(np.random.default_rng((seed, *key)).random() < self.para_mask_ratio)
