"""Samples as a configuration expects them: an image, a question, an action, an answer."""

import sys
from dataclasses import dataclass, replace

from vpt.data.build import build_masking
from vpt.data.processor import Processor
from vpt.data.synthetic import SyntheticRow, synthetic_batch
from vpt.estimate.settings import EstimateConfig
from vpt.perception.batch import VISION_TOWER, Batch, Row


@dataclass(frozen=True)
class TypicalSample:
    """One kind of sample, as a batch of one row.

    Attributes:
        kind: `none`, `region`, or the name of a re-encoder.
        share: how often it comes, masked or not; shares of all samples add up to 1.
        batch: one row.
    """

    kind: str
    share: float
    batch: Batch

    @property
    def row(self) -> Row:
        """The only row of the batch."""
        return self.batch.rows[0]

    @property
    def image_tokens(self) -> int:
        """Tokens of the vision tower: the image and a selected region."""
        return sum(block.length for block in self.row.blocks if block.source == VISION_TOWER)

    @property
    def perceived_tokens(self) -> int:
        """Re-encoded tokens."""
        return sum(block.length for block in self.row.blocks) - self.image_tokens

    @property
    def text_tokens(self) -> int:
        """Tokens of text and markers."""
        return self.row.length - self.image_tokens - self.perceived_tokens


def image_size(config: EstimateConfig) -> tuple[int, int]:
    """Width and height of the assumed image, after `data.image.max_side`."""
    side = config.data.image.max_side
    width, height = config.assume.image or (side, side * 3 // 4)
    scale = min(1.0, side / max(width, height))
    return max(1, round(width * scale)), max(1, round(height * scale))


def typical_samples(config: EstimateConfig, processor: Processor) -> list[TypicalSample]:
    """One sample of each kind; those that may be masked twice, as they are and masked."""
    assumed, masking, size = config.assume, build_masking(config), image_size(config)
    weights = (assumed.actions or config.data.actions) if config.data.perception else {"none": 1.0}
    processor, found = replace(processor, max_length=sys.maxsize), []
    for kind, weight in weights.items():
        width, height = (max(1, round(side * assumed.crop)) for side in size)
        row = SyntheticRow(
            size, assumed.question, (width, height) if kind == "region" else None,
            kind if kind in config.encoder else None, assumed.answer,
        )  # fmt: skip
        batch, share = synthetic_batch(processor, [row]), weight / sum(weights.values())
        spans = masking.spans(batch.rows[0]) if masking.para_mask_id else ()
        ratio = masking.para_mask_ratio if spans else 0.0
        masked = replace(batch, rows=[replace(batch.rows[0], masked=spans)])
        found += [TypicalSample(kind, share * (1 - ratio), batch), TypicalSample(kind, share * ratio, masked)]
    return [example for example in found if example.share]
