"""Conversations made of numbers: as many tokens of each kind as one asks for, and random pixels."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import cycle, islice
from math import prod
from typing import Any

import torch

from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER, Batch, Grid, ImageInputs, RowBuilder
from vpt.perception.mrope import GridSpan, row_positions
from vpt.perception.tokens import ActionIds, PerceptionVocabulary

ENCODER = "dino"
VOCABULARY = PerceptionVocabulary(
    im_start=1, im_end=2, vision_start=3, vision_end=4, image_pad=5, video_pad=6, end_of_text=0, region_start=7,
    region_end=8, actions={ENCODER: ActionIds(start=10, control=11, end=12, pad=13)},
)  # fmt: skip
_USER, _ASSISTANT = 20, 21
_WORDS = range(32, 96)  # any tokens


@dataclass(frozen=True)
class SyntheticRow:
    """One conversation.

    Attributes:
        image, crop: (rows, columns) of image tokens of the image, and of the region that is looked at again if any.
        question, answer: words.
        perceives: whether the re-encoder looks at the image before the answer.
        masked: whether image and question are hidden from the answer.
    """

    image: tuple[int, int] = (8, 8)
    question: int = 40
    crop: tuple[int, int] | None = None
    perceives: bool = False
    answer: int = 30
    masked: bool = False


class _Conversation(RowBuilder):
    """A synthetic row ; `grids` are those of the tower's images, `before_answer` the length of image and question."""

    def __init__(self, talk: SyntheticRow, perceived: int) -> None:
        """Write `talk`; the re-encoder makes so many tokens of an image."""
        super().__init__()
        self.grids: list[GridSpan] = []
        self.add([VOCABULARY.im_start, _USER])
        self._show(talk.image)
        self.add([*islice(cycle(_WORDS), talk.question)])
        self.before_answer = len(self.ids)
        self._answer()
        if talk.crop is not None:
            self.add([7, *_WORDS[:4], 8, VOCABULARY.im_end], loss=True)
            self.add([VOCABULARY.im_start, _USER])
            self._show(talk.crop)
            self._answer()
        if talk.perceives:
            self._perceive(perceived)
        self.add([*islice(cycle(_WORDS), talk.answer), VOCABULARY.im_end], loss=True)

    def _perceive(self, tokens: int) -> None:
        ids = VOCABULARY.actions[ENCODER]
        self.add([ids.start], loss=True)
        self.action(ENCODER, 1, token=ids.control)
        self.add([ids.end, VOCABULARY.im_end], loss=True)
        self.add([VOCABULARY.im_start, _USER, VOCABULARY.vision_start])
        self.image(ENCODER, tokens, pad=ids.pad)
        self.add([VOCABULARY.vision_end])
        self._answer()

    def _show(self, cells: tuple[int, int]) -> None:
        self.add([VOCABULARY.vision_start])
        self.grids.append(GridSpan(len(self.ids), 1, *cells))
        self.image(VISION_TOWER, prod(cells), pad=VOCABULARY.image_pad)
        self.add([VOCABULARY.vision_end])

    def _answer(self) -> None:
        self.add([VOCABULARY.im_end, VOCABULARY.im_start, _ASSISTANT])


def synthetic_batch(model: VPTModel, talks: Sequence[SyntheticRow]) -> Batch:
    """Conversations packed for a model whose tokens are `VOCABULARY`, on the model's device."""
    view: Any = model.encoder(ENCODER).transform
    written, rows, start, seen = [], [], 0, Counter[str]()
    for talk in talks:
        row = _Conversation(talk, view.tokens)
        written.append(row)
        blocks = tuple(replace(block, image=block.image + seen[block.source]) for block in row.blocks)
        masked = ((1, row.before_answer),) if talk.masked else ()
        rows.append(replace(row.build(), blocks=blocks, masked=masked, start=start))
        seen.update(block.source for block in row.blocks)
        start += len(row.ids)
    grids = [(1, 2 * grid.height, 2 * grid.width) for row in written for grid in row.grids]
    images = {VISION_TOWER: _tower_looks(model, grids)}
    if seen[ENCODER]:
        pixels = torch.randn(seen[ENCODER], 3, view.side, view.side)
        images[ENCODER] = ImageInputs(pixels, [view.tokens] * seen[ENCODER])
    ids, labels = ([token for row in written for token in getattr(row, name)] for name in ("ids", "labels"))
    positions = [row_positions(len(row.ids), row.grids) for row in written]
    return Batch(torch.tensor(ids), torch.tensor(labels), torch.cat(positions, dim=1), rows, images).to(model.device)


def _tower_looks(model: VPTModel, grids: list[Grid]) -> ImageInputs:
    vision = model.qwen.config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(sum(prod(grid) for grid in grids), values)
    return ImageInputs(pixels, [prod(grid) // vision.spatial_merge_size**2 for grid in grids], grids)
