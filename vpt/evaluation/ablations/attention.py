"""How much attention answers pay to what was perceived."""

from collections import defaultdict
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from vpt.data.images import MediaStore
from vpt.data.processor import Sample
from vpt.evaluation.ablations.base import Ablation, AblationContext
from vpt.evaluation.evaluator import answer_batch
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.statistics import Estimate, Ratio, estimates
from vpt.evaluation.summary import Metrics
from vpt.generation.generator import Generator
from vpt.generation.row_state import RowState
from vpt.models.attention import AttentionLayout, observed_attention


class AttentionMeasured(Ablation):
    """Nothing is changed, so answers have to stay as they are, to the letter. `details` tells the share of their
    attention, over all layers and heads, that the tokens of an answer pay to perceived tokens and to the first look,
    and the share of positions that these are: what it would be if everything were attended to alike.
    """

    description = "nothing: attention is measured"

    def __init__(self, context: AblationContext, *, seed: int = 0, questions: int = 64) -> None:
        """`questions`: how many of those that perceive something are measured."""
        super().__init__(context, seed=seed)
        pairs = zip(context.asked, context.plain, strict=True)
        self.measured = [question for question, item in pairs if item.actions][:questions]
        self._names = {question.record.where for question in self.measured}

    def applies_to(self, plain: Prediction) -> bool:
        return plain.record in self._names

    def details(
        self, plain: Sequence[Prediction], changed: Sequence[Prediction], metrics: Metrics
    ) -> dict[str, Estimate]:
        bundle = self.context.bundle
        generator = _Measuring.from_config(
            bundle.model, bundle.processor, bundle.tokenizer, self.context.config.generation
        )
        with observed_attention(generator.observe):
            answer_batch(generator, self.measured)
        found = [*generator.found.values()]
        columns = {name: np.array([sums[name] for sums in found]) for name in (found[0] if found else ())}
        return estimates(
            {name: Ratio(values, columns["tokens"]) for name, values in columns.items() if name != "tokens"}
        )


class _Measuring(Generator):
    """A generator that notes what each row attends to when it chooses a token after it has perceived something."""

    found: dict[int, dict[str, float]]  # of each row that has perceived: sums over its tokens, and how many they are
    layers: list[list[Tensor]]  # of a step: what each row attends to in each layer

    def start(
        self, samples: Sequence[Sample], media: Sequence[MediaStore], *, numbers: Sequence[int] | None = None,
        recording: bool = True,
    ) -> list[RowState]:  # fmt: skip
        self.found, self.layers = {}, []
        return super().start(samples, media, numbers=numbers, recording=recording)

    def observe(self, query: Tensor, key: Tensor, layout: AttentionLayout, scaling: float) -> None:
        """Keep what the last query of each row attends to in one layer: [keys], the mean over heads."""
        if not layout.keys_by_row:  # the prompts
            return
        rows, last = [], np.cumsum(layout.lengths) - 1
        for row, (place, count) in enumerate(zip(last, layout.counts, strict=True)):
            heads = query[0, :, place].float().unflatten(0, (key.shape[1], -1))
            scores = heads @ key[row, :, :count].float().transpose(1, 2) * scaling
            rows.append(scores.softmax(dim=-1).mean(dim=(0, 1)))
        self.layers.append(rows)

    def advance(self, rows: Sequence[RowState], outputs: Sequence[Tensor]) -> None:
        for row, attention in zip(rows, zip(*self.layers, strict=True), strict=True):
            if row.trace and row.pending_action is None:
                self._add(row, torch.stack(attention).mean(dim=0))
        self.layers = []
        super().advance(rows, outputs)

    def _add(self, row: RowState, attention: Tensor) -> None:
        sums = self.found.setdefault(id(row), defaultdict(float))
        sums["tokens"] += 1
        for seen, places in (("perceived", _perceived(row)), ("first_look", _first_look(row))):
            sums[f"attention_to_{seen}"] += attention[places].sum().item()
            sums[f"{seen}_positions"] += len(places) / len(attention)


def _first_look(row: RowState) -> list[int]:
    """Positions of the prompt's visual tokens."""
    return [place for block in row.sample.row.blocks for place in range(block.start, block.start + block.length)]


def _perceived(row: RowState) -> list[int]:
    """Positions of the visual tokens that the row has perceived."""
    places: list[int] = []
    start = len(row.sample.ids)
    for row_input in row.inputs:
        for visual in row_input.visuals:
            places += range(start + visual.span.start, start + visual.span.start + visual.span.length)
        start += len(row_input.ids)
    return places
