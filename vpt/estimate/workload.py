"""The workload of a micro-batch: the counts that its memory depends on."""

from collections import defaultdict
from dataclasses import dataclass

from vpt.estimate.typical_samples import TypicalSample
from vpt.flops import FlopMeter
from vpt.models.vpt import is_trained
from vpt.perception.batch import VISION_TOWER


@dataclass(frozen=True)
class Workload:
    """Positions that a micro-batch runs through the model and keeps for the backward pass; means over samples.

    Stages that nothing trained leads to keep nothing but the keys and values that later ones see.

    Attributes:
        positions: queries of all segments that keep something.
        no_grad_positions: queries of segments that keep nothing.
        keys: keys that each segment sees, its own included, summed.
        masked: pairs of a query and a key in segments that see cached keys, and so need a mask where they are padded.
        asked: positions whose last hidden states are read.
        labels: labelled positions.
        stages: how many there are.
        last_stage: positions of the last one that keeps something, the first of which the backward pass is done.
        max_grad_stage: positions of the largest one that keeps something; layers run stage by stage.
        max_stage: the same among all stages.
        patches: of the tower.
        perceived: tokens of each re-encoder.
    """

    positions: float
    no_grad_positions: float
    keys: float
    masked: float
    asked: float
    labels: float
    stages: int
    last_stage: float
    max_grad_stage: float
    max_stage: float
    patches: float
    perceived: dict[str, float]


def workload_of(meter: FlopMeter, examples: list[TypicalSample], rows: int) -> Workload:
    """The load of a micro-batch of `rows` samples, each the mean of `examples`."""
    total, perceived = defaultdict[str, float](float), defaultdict[str, float](float)
    stages, kept_stages = defaultdict[int, float](float), defaultdict[int, float](float)  # positions
    trained = is_trained(meter.model.language)
    for example in examples:
        weight, batch = example.share * rows, example.batch
        total["labels"] += weight * batch.num_labels
        total["patches"] += weight * sum(t * h * w for t, h, w in batch.images[VISION_TOWER].grids)
        for block in example.row.blocks:
            perceived[block.source] += weight * block.length
        for number, (carries, stage) in enumerate(meter.stages(batch)):
            for run in stage:
                own, keys = run.segment.length, run.segment.length + run.segment.cached_length
                stages[number] += weight * own
                if not carries and not trained:
                    total["no_grad_positions"] += weight * own
                    continue
                kept_stages[number] += weight * own
                total["positions"] += weight * own
                total["keys"] += weight * keys
                total["masked"] += weight * own * keys * (keys > own)
                total["asked"] += weight * run.outputs
    last = kept_stages.get(max(kept_stages, default=0), 0.0)
    return Workload(
        total["positions"], total["no_grad_positions"], total["keys"], total["masked"], total["asked"],
        total["labels"], len(kept_stages), last, max(kept_stages.values(), default=0.0),
        max(stages.values(), default=0.0), total["patches"], {name: perceived[name] for name in meter.model.encoders},
    )  # fmt: skip
