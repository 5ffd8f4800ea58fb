"""Whether a step costs what its arithmetic costs, and grows no faster."""

import statistics
from collections.abc import Mapping
from dataclasses import replace

import torch

from vpt.bench.measure import Measurement, time_in_turns, training_step, worst_of
from vpt.bench.models import build_50m
from vpt.bench.synthetic import SyntheticRow, synthetic_batch
from vpt.flops import FlopCost, FlopMeter

MATMUL = 2048  # rows and columns of the product whose rate is the machine's
TIMES = 4


def measure() -> list[Measurement]:
    """Utilisation, and the time of a token at four times the rows and at four times the length."""
    model, talk = build_50m(), SyntheticRow(perceives=True)
    # Four times the length: of what is read, seen and said. A re-encoder's tokens are a constant number an image.
    plain, long = SyntheticRow(), SyntheticRow(image=(16, 16), question=160, answer=0)
    missing = TIMES * synthetic_batch(model, [plain]).rows[0].length - synthetic_batch(model, [long]).rows[0].length
    long = replace(long, answer=missing)
    batches = {
        "once": synthetic_batch(model, [talk]), "rows": synthetic_batch(model, [talk] * TIMES),
        "short": synthetic_batch(model, [plain]), "long": synthetic_batch(model, [long]),
    }  # fmt: skip
    left, right = torch.randn(MATMUL, MATMUL), torch.randn(MATMUL, MATMUL)
    steps = {name: training_step(model, lambda b=batch: model(b).loss_sum) for name, batch in batches.items()}  # type: ignore[misc]
    taken = time_in_turns({**steps, "matmul": lambda: left @ right})
    rates = [2 * MATMUL**3 / time for time in taken["matmul"]]
    meter = FlopMeter(model)
    costs = {name: meter.step(batch) for name, batch in batches.items()}
    work = sum(cost.useful for cost in costs["rows"].values())
    used = [work / (time * rate) for time, rate in zip(taken["rows"], rates, strict=True)]

    def a_token(name: str, *, linear: bool) -> list[float]:
        share = linear_share(costs[name]) if linear else 1.0
        return [time * share / len(batches[name].input_ids) for time in taken[name]]

    def growth(more: str, less: str, *, linear: bool) -> float:
        pairs = zip(a_token(more, linear=linear), a_token(less, linear=linear), strict=True)
        return statistics.median(a / b for a, b in pairs)

    grown = {"rows": growth("rows", "once", linear=False), "length": growth("long", "short", linear=True)}
    return [
        Measurement("step_vs_matmul", statistics.median(used), 0.5, "higher"),
        *worst_of("growth", grown, bound=1.1),
    ]


def linear_share(parts: Mapping[str, FlopCost]) -> float:
    """The share of a step's FLOPs that grows with tokens alone. Attention's backward is twice its forward."""
    attention = sum(cost.attention * (3 if cost.backward else 1) for cost in parts.values())
    return 1 - attention / sum(cost.useful for cost in parts.values())
