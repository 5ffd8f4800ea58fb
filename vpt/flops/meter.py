"""The FLOPs of a step: which positions run how often, and which pairs they attend to."""

from collections.abc import Iterator
from typing import Literal

from vpt.batch import TOWER, Batch, Block, Looks, Row
from vpt.flops.cost import Cost, Stack, is_trained, receivers
from vpt.flops.vision import EncoderCost, TowerCost
from vpt.model import LOGIT_CHUNK, VPTModel
from vpt.segments import Segment

TOWER_PART, LANGUAGE_PART, HEAD_PART = "qwen.model.visual", "qwen.model.language_model", "qwen.lm_head"

# `seen`: pairs that the attention mask lets through, the least that must be computed. `computed`: all queries of a
# segment with all its keys, as kernels without a notion of causality, and torch's counter, have it.
Pairs = Literal["seen", "computed"]


class FlopMeter:
    """Counts the FLOPs of a step by part. Make it once what is trained has been chosen, and before anything is sharded.

    Args:
        model: on any device, the meta device too.
        pairs: which pairs of a query and a key are counted.
    """

    def __init__(self, model: VPTModel, *, pairs: Pairs = "seen") -> None:
        self.model, self.pairs = model, pairs
        language, tower = model.language, model.qwen.model.visual
        hidden, layers = language.config.hidden_size, list(language.layers)
        tower_trained = is_trained(tower)
        self.tower = TowerCost(tower)
        self.encoders = {
            name: EncoderCost(model.encoder(name), hidden, tower_trained=tower_trained) for name in model.encoders
        }
        self.sources_carry = {TOWER: tower_trained, **{n: cost.tokens_carry for n, cost in self.encoders.items()}}
        self.always_carries = language.embed_tokens.weight.requires_grad
        width = layers[0].self_attn.q_proj.out_features
        self.layers = {
            carries: Stack(layers, receivers(layers, carries=carries), width=width) for carries in (False, True)
        }
        carries = is_trained(language) or any(self._carries(name, steered=True) for name in self.sources_carry)
        self.head = Stack([model.qwen.lm_head], [carries])

    def step(self, batch: Batch) -> dict[str, Cost]:
        """One micro-batch, forward and backward: part -> cost. Parts are named as the model's modules."""
        costs = {TOWER_PART: self.tower.cost(batch.looks[TOWER].grids) if TOWER in batch.looks else Cost()}
        for name, cost in self.encoders.items():
            encoder, looks = self.model.encoder(name), batch.looks.get(self.model.view_of(name))
            if encoder.vision is not None:
                costs[f"encoders.{name}.vision"] = cost.vision * (len(looks.fresh) if looks else 0)
            costs[f"encoders.{name}.projector"] = cost.project * self._projected(name, batch, looks)
        costs |= {LANGUAGE_PART: Cost(), HEAD_PART: self._head(batch.label_count)}
        for carries, stage in self.stages(batch.rows):
            for number, segment in stage:
                for block, steered in _blocks(batch.rows[number], segment):
                    if steered:
                        costs[f"encoders.{block.source}.projector"] += self.encoders[block.source].steer
            costs[LANGUAGE_PART] += self._language([segment for _, segment in stage], carries=carries)
        return costs

    def stages(self, rows: list[Row]) -> Iterator[tuple[bool, list[tuple[int, Segment]]]]:
        """What runs together: whether its embeddings or its cached keys carry a gradient, and (row, segment)s."""
        carries = self.always_carries
        for stage in _stages(self.model.cut(rows)):
            filled = (filled for number, segment in stage for filled in _blocks(rows[number], segment))
            carries = carries or any(self._carries(block.source, steered=steered) for block, steered in filled)
            yield carries, stage

    def _projected(self, name: str, batch: Batch, looks: Looks | None) -> int:
        """How many times `EncoderCost.project` was paid: every look of the view, if any row refers to the source."""
        if looks is None or not any(block.source == name for row in batch.rows for block in row.blocks):
            return 0
        return len(looks.tokens) if self.model.encoder(name).vision is not None else sum(looks.tokens)

    def _carries(self, source: str, *, steered: bool) -> bool:
        return self.sources_carry[source] or (
            steered and source in self.encoders and self.encoders[source].steering_carries
        )

    def _language(self, segments: list[Segment], *, carries: bool) -> Cost:
        """One stage: the decoder layers over one segment of each row."""
        positions = sum(segment.stop - segment.start for segment in segments)
        pairs = sum(count_pairs(segment, self.pairs) for segment in segments)
        return self.layers[carries].cost(positions, pairs, again=self.model.passes.checkpointing)

    def _head(self, labels: int) -> Cost:
        once = self.head.cost(labels)
        if labels <= LOGIT_CHUNK or not self.head.backward:
            return once
        return once + Cost(recomputed=once.linear)  # chunks of logits are made again in the backward pass


def _stages(cuts: list[list[Segment]]) -> list[list[tuple[int, Segment]]]:
    """Segment number i of every row that has one, with the row's number."""
    longest = max(len(segments) for segments in cuts)
    return [[(row, cut[i]) for row, cut in enumerate(cuts) if i < len(cut)] for i in range(longest)]


def _blocks(row: Row, segment: Segment) -> list[tuple[Block, bool]]:
    """The blocks that a segment fills in, and whether a control state steers each."""
    steered = {action.block for action in row.actions[: segment.known]}
    return [
        (block, number in steered)
        for number, block in enumerate(row.blocks)
        if segment.start <= block.start and block.start + block.length <= segment.stop
    ]


def count_pairs(segment: Segment, pairs: Pairs = "seen") -> int:
    """Pairs of a query of a segment and a key, cached or its own."""
    own, cached = segment.stop - segment.start, sum(run.stop - run.start for run in segment.sees)
    if pairs == "computed":
        return own * (cached + own)
    hidden = 0
    if segment.hides is not None:
        first, start, stop = segment.hides
        hidden = (segment.stop - first) * (stop - start)
    return own * cached + own * (own + 1) // 2 - hidden
