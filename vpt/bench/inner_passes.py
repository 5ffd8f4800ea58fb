"""Time of two inner passes over one, and of masking between them."""

from dataclasses import replace

from torch import Tensor

from vpt.bench.measure import Measurement, Timed, median_ratio, time_in_turns, training_step
from vpt.bench.models import build_50m
from vpt.bench.synthetic import SyntheticRow, synthetic_batch
from vpt.models.vpt import InnerForwardConfig, VPTModel
from vpt.perception.batch import Batch

ROWS = 2


def step_with(model: VPTModel, batch: Batch, passes: InnerForwardConfig) -> Timed:
    """A training step of `batch`, walked as `passes` say."""

    def loss() -> Tensor:
        model.forward_config = passes
        return model(batch).loss_sum / batch.num_labels

    return training_step(model, loss)


def measure() -> list[Measurement]:
    """The plain side is the same tokens in one pass, nothing conditioned, with the same logits."""
    model, talk = build_50m(), SyntheticRow(perceives=True)
    open_, masked = (synthetic_batch(model, [replace(talk, masked=hidden)] * ROWS) for hidden in (False, True))
    taken = time_in_turns(
        {
            "plain": step_with(model, open_, InnerForwardConfig(num_inner_forward_run=1)),
            "shared": step_with(model, open_, InnerForwardConfig()),
            "full": step_with(model, open_, InnerForwardConfig("full")),
            "bottleneck": step_with(model, masked, InnerForwardConfig(mask_mode="bottleneck")),
            "zero": step_with(model, masked, InnerForwardConfig(mask_mode="zero")),
        }
    )
    return [
        Measurement("shared_vs_plain", median_ratio(taken["shared"], taken["plain"]), 1.05),
        Measurement("full_vs_shared", median_ratio(taken["full"], taken["shared"]), 1.9, "higher"),
        Measurement("bottleneck_vs_plain", median_ratio(taken["bottleneck"], taken["plain"]), 1.05),
        Measurement("zero_vs_plain", median_ratio(taken["zero"], taken["plain"]), 1.7),
    ]
