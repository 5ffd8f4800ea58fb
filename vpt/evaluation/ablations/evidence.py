"""The evidence alone, among tokens that were encoded with all of the image around them."""

from functools import cache
from math import isqrt

import torch
from torch import Tensor

from vpt.data.records import Record
from vpt.evaluation.ablations.base import Ablation, AblationContext, full_image
from vpt.evaluation.predictions import Prediction
from vpt.perception.batch import VISION_TOWER
from vpt.perception.requests import REGION


class TokensOfEvidence(Ablation):
    """Re-encoded tokens that show nothing of the true box are zero. `FeaturesEvidence` blanks pixels instead, and with
    them what tells where the evidence is, such as the frame around a digit."""

    description = "re-encoded tokens zeroed but for those of the true box"

    def __init__(self, setting: AblationContext, *, seed: int = 0) -> None:
        super().__init__(setting, seed=seed)
        self._size = cache(lambda where: full_image(self.question_of[where]).size)

    def applies_to(self, plain: Prediction) -> bool:
        return bool(plain.actions) and REGION not in plain.actions and plain.box is not None

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        side = isqrt(len(tokens))
        if source == VISION_TOWER or record.box is None or side * side != len(tokens):
            return tokens
        left, top, right, bottom = self.context.parts.processor.transforms[source].coverage(self._size(record.where))
        x0, y0, x1, y1 = record.box
        across, down, step = (right - left) / side, (bottom - top) / side, torch.arange(side, device=tokens.device)
        columns = (left + step * across < x1) & (left + (step + 1) * across > x0)
        rows = (top + step * down < y1) & (top + (step + 1) * down > y0)
        return tokens * (rows[:, None] & columns).flatten()[:, None]
