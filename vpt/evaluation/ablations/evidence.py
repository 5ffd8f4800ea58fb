"""Ablations that leave the evidence alone: what a look that finds it would bring."""

from functools import cache
from math import isqrt

import torch
from PIL import Image
from torch import Tensor

from vpt.data.records import Record
from vpt.evaluation.ablations.base import Ablation, AblationContext, full_image
from vpt.evaluation.ablations.features import GREY
from vpt.evaluation.predictions import Prediction
from vpt.perception.batch import VISION_TOWER
from vpt.perception.requests import REGION


class EvidenceAblation(Ablation):
    """Changes what is re-encoded to tell of the true box alone, where the record knows it."""

    def applies_to(self, plain: Prediction) -> bool:
        return bool(plain.actions) and REGION not in plain.actions and plain.box is not None


class FeaturesEvidence(EvidenceAblation):
    """All pixels but those of the true box are blank."""

    description = "all but the true box blanked before it is re-encoded"

    def image(self, image: Image.Image, *, record: Record) -> Image.Image:
        shown = Image.new(image.mode, image.size, GREY)
        if record.box is not None:
            shown.paste(image.crop(record.box), record.box[:2])
        return shown


class TokensOfEvidence(EvidenceAblation):
    """Re-encoded tokens that show nothing of the true box are zero. They were encoded with all of the image around
    them, which `FeaturesEvidence` takes away: with it goes what tells where the evidence is, such as a digit's frame.
    """

    description = "re-encoded tokens zeroed but for those of the true box"

    def __init__(self, context: AblationContext, *, seed: int = 0) -> None:
        super().__init__(context, seed=seed)
        self._size = cache(lambda where: full_image(self.question_of[where]).size)

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        side = isqrt(len(tokens))
        if source == VISION_TOWER or record.box is None or side * side != len(tokens):
            return tokens
        left, top, right, bottom = self.context.bundle.processor.transforms[source].coverage(self._size(record.where))
        x0, y0, x1, y1 = record.box
        across, down, step = (right - left) / side, (bottom - top) / side, torch.arange(side, device=tokens.device)
        columns = (left + step * across < x1) & (left + (step + 1) * across > x0)
        rows = (top + step * down < y1) & (top + (step + 1) * down > y0)
        return tokens * (rows[:, None] & columns).flatten()[:, None]
