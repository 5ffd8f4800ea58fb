"""Whether a step costs what its arithmetic costs, and grows no faster."""

from collections.abc import Mapping
from dataclasses import replace

import torch

from vpt.bench.measure import Measurement, Ratio, time_in_turns, training_step, worst_of
from vpt.bench.models import SMALL
from vpt.data.synthetic import SyntheticRow, synthetic_batch
from vpt.flops import FlopCost, FlopMeter

MATMUL = 2048  # rows and columns of the product whose rate is the machine's
TIMES = 4


def measure() -> list[Measurement]:
    """Utilisation, and the time of a token at four times the rows and at four times the length."""
    bundle = SMALL.build()
    # Four times the length: of image, question and answer. A re-encoder's tokens are a constant number an image.
    plain, long = SyntheticRow(), SyntheticRow((256, 256), question=160, answer=0)
    short, start = (len(synthetic_batch(bundle.processor, [row]).input_ids) for row in (plain, long))
    long = replace(long, answer=TIMES * short - start)
    rows = {"once": [SMALL.row], "rows": [SMALL.row] * TIMES, "short": [plain], "long": [long]}
    batches = {name: synthetic_batch(bundle.processor, those) for name, those in rows.items()}
    left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    steps = {name: training_step(bundle.model, batch) for name, batch in batches.items()}
    taken = time_in_turns({**steps, "matmul": lambda: left @ right})
    meter = FlopMeter(bundle.model)
    costs = {name: meter.step(batch) for name, batch in batches.items()}
    work = sum(cost.useful for cost in costs["rows"].values())
    used = [work * time / (2 * MATMUL**3 * step) for step, time in zip(taken["rows"], taken["matmul"], strict=True)]

    def growth(more: str, less: str, *, linear: bool) -> Ratio:
        """Time of a token in one batch over that in another; `linear`: of the work that grows with tokens alone."""
        share, tokens = linear_share if linear else lambda parts: 1.0, {n: len(b.input_ids) for n, b in batches.items()}
        factor = share(costs[more]) / share(costs[less]) * tokens[less] / tokens[more]
        return Ratio.of(taken[more], taken[less]) * factor

    grown = {"rows": growth("rows", "once", linear=False), "length": growth("long", "short", linear=True)}
    return [
        Measurement("step_vs_matmul", Ratio.median(used), 0.5, "higher"),
        *worst_of("growth", grown, bound=1.1),
    ]


def linear_share(parts: Mapping[str, FlopCost]) -> float:
    """The share of a step's FLOPs that grows with tokens alone. Attention's backward is twice its forward."""
    attention = sum(cost.attention * (3 if cost.backward else 1) for cost in parts.values())
    return 1 - attention / sum(cost.useful for cost in parts.values())
