"""What a micro-batch puts through the model, as its memory depends on it."""

from collections import defaultdict
from dataclasses import dataclass

from vpt.estimate.typical_samples import TypicalSample
from vpt.flops import FlopMeter
from vpt.models.vpt import is_trained
from vpt.perception.batch import VISION_TOWER
from vpt.perception.segments import Segment


@dataclass(frozen=True)
class Workload:
    """What a micro-batch runs through the model and keeps for the backward pass; means over samples, so fractions.

    Stages that nothing trained leads to keep nothing but the keys and values that later ones see: `passing`.

    Attributes:
        positions: queries of all segments.
        passing: queries of segments that keep nothing.
        keys: keys that each segment sees, its own included, summed.
        masked: pairs of a query and a key in segments that see cached keys, and so need a mask where they are padded.
        asked: positions whose last hidden states are read.
        labels: labelled positions.
        stages: how many there are.
        largest: positions of the largest one; layers run stage by stage.
        widest: the same among all stages, those that keep nothing too.
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
    max_grad_stage: float
    max_stage: float
    patches: float
    perceived: dict[str, float]


@dataclass(frozen=True)
class WeightedRun:
    """A segment that so many rows of a micro-batch run."""

    weight: float
    stage: int
    segment: Segment
    asked: int
    keeps: bool

    @property
    def own(self) -> int:
        """Its queries."""
        return self.segment.stop - self.segment.start

    @property
    def past(self) -> int:
        """Cached keys that it sees."""
        return sum(run.stop - run.start for run in self.segment.attends_to)


def _largest(runs: list[WeightedRun]) -> float:
    """Positions of the largest stage."""
    stages: defaultdict[int, float] = defaultdict(float)
    for run in runs:
        stages[run.stage] += run.weight * run.own
    return max(stages.values(), default=0.0)


def workload_of(meter: FlopMeter, examples: list[TypicalSample], rows: int) -> Workload:
    """The load of a micro-batch of `rows` samples, each the mean of `examples`."""
    runs = [
        WeightedRun(example.share * rows, number, run.segment, run.asked, carries or is_trained(meter.model.language))
        for example in examples
        for number, (carries, stage) in enumerate(meter.stages(example.batch))
        for run in stage
    ]
    keeping = [run for run in runs if run.keeps]
    grids = [(example.share * rows, grid) for example in examples for grid in example.batch.images[VISION_TOWER].grids]
    return Workload(
        positions=sum(run.weight * run.own for run in keeping),
        no_grad_positions=sum(run.weight * run.own for run in runs if not run.keeps),
        keys=sum(run.weight * (run.own + run.past) for run in keeping),
        masked=sum(run.weight * run.own * (run.own + run.past) for run in keeping if run.past),
        asked=sum(run.weight * run.asked for run in keeping),
        labels=sum(example.share * rows * example.batch.num_labels for example in examples),
        stages=len({run.stage for run in keeping}),
        max_grad_stage=_largest(keeping),
        max_stage=_largest(runs),
        patches=sum(weight * t * h * w for weight, (t, h, w) in grids),
        perceived={
            name: sum(
                example.share * rows * block.length
                for example in examples
                for block in example.row.blocks
                if block.source == name
            )
            for name in meter.model.encoders
        },
    )
