"""What a step trains on, and its loss: records with labels, or rollouts with rewards (`vpt.training.policy_objective`).

The loop is the same for all of them.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from vpt.config.schema import TrainConfig
from vpt.data.build import build_dataset
from vpt.data.loader import build_dataloader
from vpt.data.processor import Processor
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.distributed.process_group import World
from vpt.models.output import Output
from vpt.perception.batch import Batch


class Objective:
    """Supervised: the mean negative log-likelihood of labelled tokens over the global batch."""

    def __init__(self, config: TrainConfig, processor: Processor, world: World, device: torch.device) -> None:
        self.config, self.pin = config, device.type == "cuda"
        self.dataset = build_dataset(config, processor, rank=world.rank, world_size=world.size)

    def batches(self, start: int) -> Iterator[list[Batch]]:
        """This process's micro-batches of each step from `start` on."""
        return build_dataloader(self.dataset, start=start, workers=self.config.data.workers, pin=self.pin)

    def loss(self, batch: Batch, output: Output, totals: GlobalCounts) -> Tensor:
        """The part of the step's loss that a micro-batch has; parts of all processes add up to it."""
        return output.loss_sum / max(totals.labels, 1)

    def metrics(self) -> dict[str, float]:
        """Metrics of a logged step, and a collective where there are any."""
        return {}

    def examples(self) -> list[dict[str, Any]]:
        """What rank 0 shows of a logged step, a line each of `rollouts.jsonl`."""
        return []

    def resumable(self, step: int) -> bool:
        """Whether a run can begin again after `step` steps from its weights alone."""
        return True
