"""Conversations made of numbers: as many tokens of each kind as one asks for, and random pixels."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import cycle, islice
from math import prod

import torch

from vpt.models.vpt import VPTModel
from vpt.perception.batch import IGNORE_INDEX, VISION_TOWER, Action, Batch, Grid, ImageInputs, PlaceholderSpan, Row
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


@dataclass
class _Writer:
    """Writes rows one after the other and counts what they look at."""

    model: VPTModel
    ids: list[int] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    blocks: list[PlaceholderSpan] = field(default_factory=list)
    grids: list[GridSpan] = field(default_factory=list)
    seen: dict[str, list[Grid]] = field(default_factory=dict)

    def row(self, talk: SyntheticRow) -> Row:
        """Write one conversation."""
        self.ids, self.labels, self.blocks, self.grids = [], [], [], []
        self._say(VOCABULARY.im_start, _USER)
        self._show(talk.image)
        self._say(*islice(cycle(_WORDS), talk.question))
        first = (1, len(self.ids))
        self._turn()
        if talk.crop is not None:
            self._say(7, *_WORDS[:4], 8, VOCABULARY.im_end, learnt=True)
            self._say(VOCABULARY.im_start, _USER)
            self._show(talk.crop)
            self._turn()
        action = self._perceive() if talk.perceives else None
        self._say(*islice(cycle(_WORDS), talk.answer), VOCABULARY.im_end, learnt=True)
        return Row(
            len(self.ids), tuple(self.blocks), (action,) if action else (), masked=(first,) if talk.masked else ()
        )

    def _perceive(self) -> Action:
        ids, encoder = VOCABULARY.actions[ENCODER], self.model.encoder(ENCODER)
        tokens: int = encoder.transform.tokens  # type: ignore[attr-defined]
        self._say(ids.start, learnt=True)
        action = Action(len(self.ids), 1, ENCODER, len(self.blocks))
        self._say(ids.control)
        self._say(ids.end, VOCABULARY.im_end, learnt=True)
        self._say(VOCABULARY.im_start, _USER, VOCABULARY.vision_start)
        self._block(ENCODER, tokens, (0, 0, 0))
        self._say(*[ids.pad] * tokens, VOCABULARY.vision_end)
        self._turn()
        return action

    def _show(self, cells: tuple[int, int]) -> None:
        self._say(VOCABULARY.vision_start)
        self.grids.append(GridSpan(len(self.ids), 1, *cells))
        self._block(VISION_TOWER, prod(cells), (1, 2 * cells[0], 2 * cells[1]))
        self._say(*[VOCABULARY.image_pad] * prod(cells), VOCABULARY.vision_end)

    def _block(self, source: str, tokens: int, grid: Grid) -> None:
        looks = self.seen.setdefault(source, [])
        self.blocks.append(PlaceholderSpan(len(self.ids), tokens, source, len(looks)))
        looks.append(grid)

    def _turn(self) -> None:
        self._say(VOCABULARY.im_end, VOCABULARY.im_start, _ASSISTANT)

    def _say(self, *ids: int, learnt: bool = False) -> None:
        self.ids.extend(ids)
        self.labels.extend(ids if learnt else [IGNORE_INDEX] * len(ids))


def synthetic_batch(model: VPTModel, talks: Sequence[SyntheticRow]) -> Batch:
    """Conversations packed for a model whose tokens are `VOCABULARY`, on the model's device."""
    writer, rows, start = _Writer(model), [], 0
    ids, labels, positions = [], [], []
    for talk in talks:
        row = writer.row(talk)
        row = Row(row.length, row.blocks, row.actions, masked=row.masked, start=start)
        rows.append(row)
        start += row.length
        ids += writer.ids
        labels += writer.labels
        positions.append(row_positions(row.length, writer.grids))
    looks = {VISION_TOWER: _tower_looks(model, writer.seen[VISION_TOWER])}
    if ENCODER in writer.seen:
        view = model.encoder(ENCODER).transform
        count = len(writer.seen[ENCODER])
        looks[ENCODER] = ImageInputs(torch.randn(count, 3, view.side, view.side), [view.tokens] * count)  # type: ignore[attr-defined]
    batch = Batch(torch.tensor(ids), torch.tensor(labels), torch.cat(positions, dim=1), rows, looks)
    return batch.to(model.device)


def _tower_looks(model: VPTModel, grids: list[Grid]) -> ImageInputs:
    vision = model.qwen.config.vision_config
    values = 3 * vision.temporal_patch_size * vision.patch_size**2
    pixels = torch.randn(sum(prod(grid) for grid in grids), values)
    return ImageInputs(pixels, [prod(grid) // vision.spatial_merge_size**2 for grid in grids], grids)
