"""The FLOPs of a step: which positions run how often, and which pairs they attend to."""

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

import numpy as np

from vpt.flops.cost import DecoderCost, FlopCost, LayerStack
from vpt.flops.vision import EncoderCost, TowerCost
from vpt.models.output import LOGIT_CHUNK
from vpt.models.vpt import VPTModel, is_trained
from vpt.perception.batch import VISION_TOWER, Batch, ImageInputs, PlaceholderSpan, Row
from vpt.perception.segments import Segment

TOWER_PART, LANGUAGE_PART, HEAD_PART = "qwen.model.visual", "qwen.model.language_model", "qwen.lm_head"
# `causal`: pairs that the attention mask lets through, the least that must be computed. `dense`: all queries of a
# segment with all its keys, as kernels without a notion of causality, and torch's counter, have it.
Pairs = Literal["causal", "dense"]


@dataclass(frozen=True)
class SegmentRun:
    """A segment of a row; how many of its hidden states are read, at labels and as control states; how many keys of
    another row it sees (`Row.prefix`)."""

    row: Row
    segment: Segment
    outputs: int
    prefix: int = 0


class FlopMeter:
    """Counts the FLOPs of a step by part. Make it once what is trained has been chosen, and before anything is sharded.

    Args:
        model: on any device, the meta device too.
        pairs: which pairs of a query and a key are counted.
    """

    def __init__(self, model: VPTModel, *, pairs: Pairs = "causal") -> None:
        self.model, self.pairs = model, pairs
        language, tower = model.language, model.tower
        hidden, layers = language.config.hidden_size, list(language.layers)
        tower_trained = is_trained(tower)
        self.tower = TowerCost(tower)
        self.encoders = {
            name: EncoderCost(model.encoder(name), hidden, tower_trained=tower_trained) for name in model.encoders
        }
        self.sources_carry = {
            VISION_TOWER: tower_trained,
            **{n: cost.tokens_carry for n, cost in self.encoders.items()},
        }
        self.always_carries = language.embed_tokens.weight.requires_grad
        self.layers = {carries: DecoderCost(layers, carries=carries) for carries in (False, True)}
        carries = is_trained(language) or any(self._carries(name, conditioned=True) for name in self.sources_carry)
        self.head = LayerStack([model.qwen.lm_head], [carries])

    def step(self, batch: Batch) -> dict[str, FlopCost]:
        """One micro-batch, forward and backward: part -> cost. Parts are named as the model's modules."""
        costs = {
            TOWER_PART: self.tower.cost(batch.images[VISION_TOWER].grids)
            if VISION_TOWER in batch.images
            else FlopCost()
        }
        for name, cost in self.encoders.items():
            encoder, images = self.model.encoder(name), batch.images.get(self.model.transform_of(name))
            if encoder.vision is not None:
                costs[f"encoders.{name}.vision"] = cost.vision * (sum(images.uncached) // cost.tokens if images else 0)
            costs[f"encoders.{name}.projector"] = cost.project * self._projected(name, batch, images)
        costs |= {LANGUAGE_PART: FlopCost(), HEAD_PART: self._head(batch.num_labels)}
        for carries, stage in self.stages(batch):
            for block, conditioned in (filled for run in stage for filled in _blocks(run)):
                if conditioned:
                    costs[f"encoders.{block.source}.projector"] += self.encoders[block.source].condition
            costs[LANGUAGE_PART] += self._language(stage, carries=carries)
        return costs

    def stages(self, batch: Batch) -> Iterator[tuple[bool, list[SegmentRun]]]:
        """The segments of each stage, and whether its embeddings or cached keys carry a gradient."""
        carries = self.always_carries
        rows = [
            _runs(row, cuts, batch.loss_positions, 0 if row.prefix is None else batch.rows[row.prefix].length)
            for row, cuts in zip(batch.rows, self.model.split_segments(batch.rows), strict=True)
        ]
        for together in zip_longest(*rows):  # rows with a prefix run a stage later, which costs the same
            stage = [run for run in together if run is not None]
            filled = (filled for run in stage for filled in _blocks(run))
            carries = carries or any(
                self._carries(block.source, conditioned=conditioned) for block, conditioned in filled
            )
            yield carries, stage

    def _projected(self, name: str, batch: Batch, images: ImageInputs | None) -> int:
        """Number of images (or tokens) that a source's projector runs on: all, if any row refers to the source."""
        if images is None or not any(block.source == name for row in batch.rows for block in row.blocks):
            return 0
        return sum(images.tokens) // self.encoders[name].tokens

    def _carries(self, source: str, *, conditioned: bool) -> bool:
        return self.sources_carry[source] or (
            conditioned and source in self.encoders and self.encoders[source].condition_carries
        )

    def _language(self, stage: list[SegmentRun], *, carries: bool) -> FlopCost:
        """One stage: the decoder layers over one segment of each row."""
        positions, outputs = sum(run.segment.length for run in stage), sum(run.outputs for run in stage)
        pairs = sum(count_pairs(run.segment, self.pairs) + run.segment.length * run.prefix for run in stage)
        return self.layers[carries].cost(positions, outputs, pairs, again=self.model.forward_config.checkpointing)

    def _head(self, labels: int) -> FlopCost:
        once = self.head.cost(labels)
        if labels <= LOGIT_CHUNK or not self.head.backward:
            return once
        return once + FlopCost(recomputed=once.linear)  # chunks of logits are made again in the backward pass


def _runs(row: Row, segments: list[Segment], predicting: np.ndarray, prefix: int) -> list[SegmentRun]:
    """The segments of a row, in the order in which they run."""
    last = np.zeros(row.length, dtype=np.int64)  # the run that computes a position as it counts
    for number, segment in enumerate(segments):
        last[segment.start : segment.stop] = number
    own = predicting[(row.start <= predicting) & (predicting < row.start + row.length)] - row.start
    return [
        SegmentRun(row, segment, len({*own[last[own] == number].tolist(), *segment.control_positions}), prefix)
        for number, segment in enumerate(segments)
    ]


def _blocks(run: SegmentRun) -> list[tuple[PlaceholderSpan, bool]]:
    """The blocks that a segment fills in, and whether a control state conditions each."""
    row, segment = run.row, run.segment
    conditioned = {action.block for action in row.actions[: segment.resolved_actions]}
    return [
        (block, number in conditioned)
        for number, block in enumerate(row.blocks)
        if segment.start <= block.start and block.start + block.length <= segment.stop
    ]


def count_pairs(segment: Segment, pairs: Pairs = "causal") -> int:
    """Pairs of a query of a segment and a key, cached or its own."""
    own, cached = segment.length, segment.cached_length
    if pairs == "dense":
        return own * (cached + own)
    hidden = 0
    if segment.hidden_span is not None:
        first, start, stop = segment.hidden_span
        hidden = (segment.stop - first) * (stop - start)
    return own * cached + own * (own + 1) // 2 - hidden
