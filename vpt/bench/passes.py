"""What two inner passes cost, and masking between them."""

from dataclasses import replace

from torch import Tensor

from vpt.batch import Batch
from vpt.bench.figures import Figure, Side, median_ratio, seconds, training_step
from vpt.bench.models import medium
from vpt.bench.talks import Talk, batch_of
from vpt.model import InnerPasses, VPTModel

ROWS = 2


def walked(model: VPTModel, batch: Batch, passes: InnerPasses) -> Side:
    """A training step of `batch`, walked as `passes` say."""

    def loss() -> Tensor:
        model.passes = passes
        return model(batch).loss_sum / batch.label_count

    return training_step(model, loss)


def measure() -> list[Figure]:
    """The plain side is the same tokens in one pass, nothing conditioned, with the same logits."""
    model, talk = medium(), Talk(perceives=True)
    open_, masked = (batch_of(model, [replace(talk, masked=hidden)] * ROWS) for hidden in (False, True))
    taken = seconds(
        {
            "plain": walked(model, open_, InnerPasses(num_inner_forward_run=1)),
            "shared": walked(model, open_, InnerPasses()),
            "full": walked(model, open_, InnerPasses("full")),
            "bottleneck": walked(model, masked, InnerPasses(mask_mode="bottleneck")),
            "zero": walked(model, masked, InnerPasses(mask_mode="zero")),
        }
    )
    return [
        Figure("shared_vs_plain", median_ratio(taken["shared"], taken["plain"]), 1.05),
        Figure("full_vs_shared", median_ratio(taken["full"], taken["shared"]), 1.9, "higher"),
        Figure("bottleneck_vs_plain", median_ratio(taken["bottleneck"], taken["plain"]), 1.05),
        Figure("zero_vs_plain", median_ratio(taken["zero"], taken["plain"]), 1.7),
    ]
