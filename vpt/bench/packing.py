"""Time of packed over padded rows, and memory of logits at labels alone."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.bench.measure import Measurement, ratio, training_step
from vpt.bench.memory import ROWS, peak_bytes
from vpt.bench.models import SMALL
from vpt.data.synthetic import SyntheticRow, synthetic_batch
from vpt.models.inner_forward import StagedKVCache
from vpt.models.vpt import VPTModel
from vpt.perception.batch import IGNORE_INDEX, Batch

# A plain row, one that re-encodes, one with a region: 80 to 900 tokens, as near as three come to 35:35:30.
MIX = (
    SyntheticRow(image=(64, 64), question=24, answer=16),
    SMALL.row,
    SyntheticRow(image=(320, 320), question=60, crop=(288, 288), answer=70),
)
PUBLISHED_VOCABULARY = 152_064


def measure() -> list[Measurement]:
    """A step over rows packed / over the same rows, each filled up to the longest with tokens that carry no loss;
    memory that a step takes on top of the weights, at its peak: logits where there is a label / everywhere."""
    bundle = SMALL.build()
    packed = synthetic_batch(bundle.processor, MIX)
    sides = [training_step(bundle.model, batch) for batch in (packed, pad(packed))]
    wide = replace(SMALL, qwen=SMALL.qwen | {"vocab_size": PUBLISHED_VOCABULARY}).build()
    batch = synthetic_batch(wide.processor, [SMALL.row] * ROWS)
    losses = (batch, lambda: loss_of_all_logits(wide.model, batch))
    labelled, everywhere = (peak_bytes(wide.model, training_step(wide.model, loss)) for loss in losses)
    return [
        Measurement("packed_vs_padded", ratio(*sides), 0.6),
        Measurement("labelled_logits_memory", labelled / everywhere, 0.5),
    ]


def pad(batch: Batch) -> Batch:
    """Every row as long as the longest: text without loss at its end."""
    longest = max(row.length for row in batch.rows)

    def filled(values: Tensor, value: int) -> Tensor:
        parts = values.split([row.length for row in batch.rows], dim=-1)
        return torch.cat([F.pad(part, (0, longest - part.shape[-1]), value=value) for part in parts], dim=-1)

    rows = [replace(row, length=longest, start=number * longest) for number, row in enumerate(batch.rows)]
    return Batch(
        filled(batch.input_ids, 0), filled(batch.labels, IGNORE_INDEX), filled(batch.positions, 0), rows, batch.images
    )


def loss_of_all_logits(model: VPTModel, batch: Batch) -> Tensor:
    """The loss computed from logits at every position, as language models commonly do."""
    targets = torch.roll(batch.labels, -1)
    targets[[row.start + row.length - 1 for row in batch.rows]] = IGNORE_INDEX
    plan = model.plan_forward(batch)
    tokens = model.project_features(model.encode_images(batch.images), batch)
    hidden, _ = model.run_stages(batch, plan, tokens, StagedKVCache())
    logits = model.logits(hidden[plan.output_index])
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
