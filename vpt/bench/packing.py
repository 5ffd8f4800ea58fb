"""Time of packed over padded rows, and memory of logits at labels alone."""

from dataclasses import replace

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.bench.measure import Measurement, ratio, training_step
from vpt.bench.memory import ROWS, peak_bytes
from vpt.bench.models import build_50m
from vpt.bench.synthetic import SyntheticRow, synthetic_batch
from vpt.models.inner_forward import StagedKVCache
from vpt.models.vpt import VPTModel
from vpt.perception.batch import IGNORE_INDEX, Batch

# A plain row, one that re-encodes, one with a region: 80 to 900 tokens, as near as three come to 35:35:30.
MIX = (
    SyntheticRow(image=(4, 4), question=36, answer=16),
    SyntheticRow(perceives=True),
    SyntheticRow(image=(20, 20), question=80, crop=(18, 18), answer=70),
)
PUBLISHED_VOCABULARY = 152_064


def measure() -> list[Measurement]:
    """Packed against padded, labelled against all logits."""
    return [packed_vs_padded(), labelled_logits_memory()]


def packed_vs_padded() -> Measurement:
    """A step over rows packed / over the same rows, each filled up to the longest with tokens that carry no loss."""
    model = build_50m()
    packed = synthetic_batch(model, MIX)
    padded = pad(packed)
    sides = [training_step(model, lambda batch=batch: model(batch).loss_sum) for batch in (packed, padded)]  # type: ignore[misc]
    return Measurement("packed_vs_padded", ratio(*sides), 0.6)


def pad(batch: Batch) -> Batch:
    """Every row as long as the longest: text without loss at its end."""
    longest = max(row.length for row in batch.rows)
    fills = [longest - row.length for row in batch.rows]
    ends = [row.start + row.length for row in batch.rows]

    def filled(values: Tensor, with_: int) -> Tensor:
        parts = [
            F.pad(values[..., end - row.length : end], (0, fill), value=with_)
            for row, end, fill in zip(batch.rows, ends, fills, strict=True)
        ]
        return torch.cat(parts, dim=-1)

    rows = [replace(row, length=longest, start=number * longest) for number, row in enumerate(batch.rows)]
    return Batch(
        filled(batch.input_ids, 0), filled(batch.labels, IGNORE_INDEX), filled(batch.positions, 0), rows, batch.images
    )


def labelled_logits_memory() -> Measurement:
    """Memory that a step takes on top of the weights, at its peak: logits where there is a label / everywhere."""
    model = build_50m(vocabulary=PUBLISHED_VOCABULARY)
    batch = synthetic_batch(model, [SyntheticRow(perceives=True)] * ROWS)
    labelled = peak_bytes(model, training_step(model, lambda: model(batch).loss_sum))
    everywhere = peak_bytes(model, training_step(model, lambda: loss_of_all_logits(model, batch)))
    return Measurement("labelled_logits_memory", labelled / everywhere, 0.5)


def loss_of_all_logits(model: VPTModel, batch: Batch) -> Tensor:
    """The loss computed from logits at every position, as language models commonly do."""
    targets = torch.roll(batch.labels, -1)
    targets[[row.start + row.length - 1 for row in batch.rows]] = IGNORE_INDEX
    walk = model.plan_forward(batch)
    hidden, _ = model.run_stages(
        batch, walk, model.project_features(model.encode_images(batch.images), batch), StagedKVCache()
    )
    logits = model.logits(hidden[walk.output_index])
    return F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="sum")
