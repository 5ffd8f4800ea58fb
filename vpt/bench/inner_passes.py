"""Time of two inner passes over one, and of masking between them."""

from dataclasses import replace
from typing import Any

from vpt.bench.measure import Measurement, Ratio, time_in_turns, training_step
from vpt.bench.models import SMALL
from vpt.data.synthetic import synthetic_batch

ROWS = 2
PASSES: dict[str, dict[str, Any]] = {
    "plain": {"num_inner_forward_run": 1}, "shared": {}, "full": {"inner_forward": "full"},
    "bottleneck": {"mask_mode": "bottleneck"}, "zero": {"mask_mode": "zero"},
}  # fmt: skip


def measure() -> list[Measurement]:
    """The plain side is the same tokens in one pass, nothing conditioned, with the same logits."""
    bundle = SMALL.build()
    rows = [[replace(SMALL.row, masked=masked)] * ROWS for masked in (False, True)]
    batches = [synthetic_batch(bundle.processor, those) for those in rows]
    taken = time_in_turns(
        {name: training_step(bundle.model, batches["mask_mode" in how], **how) for name, how in PASSES.items()}
    )
    return [
        Measurement("shared_vs_plain", Ratio.of(taken["shared"], taken["plain"]), 1.05),
        Measurement("full_vs_shared", Ratio.of(taken["full"], taken["shared"]), 1.9, "higher"),
        Measurement("bottleneck_vs_plain", Ratio.of(taken["bottleneck"], taken["plain"]), 1.05),
        Measurement("zero_vs_plain", Ratio.of(taken["zero"], taken["plain"]), 1.7),
    ]
