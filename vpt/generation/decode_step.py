"""Inputs that rows pass to the next decode step, packed into one stage of `extend`."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from itertools import accumulate

import torch
from torch import Tensor
from torch.nn import functional as F

from vpt.data.transforms import ProcessedImage
from vpt.models.attention import AttentionLayout
from vpt.models.stage import InsertCollector, Stage
from vpt.perception.batch import PlaceholderSpan


@dataclass
class VisualInput:
    """An image for a placeholder span of a `RowInput`, and the control states [s, D] that condition it, if any.

    `alter` is what an intervention does to its tokens, before they are conditioned.
    """

    span: PlaceholderSpan
    image: ProcessedImage
    control_states: Tensor | None
    alter: Callable[[Tensor], Tensor]


@dataclass
class RowInput:
    """Token ids and visual inputs that a row passes to the next decode step.

    Attributes:
        ids: tokens.
        visuals: the images that fill placeholder tokens among them, in order.
        states: [n, D] embeddings of the leading tokens (control tokens, a prompt's images) instead of their own, or
            [n, (1 + k) D], each with k deep features.
        positions: [3, n] of a part of a prompt; None: those that continue the row's.
        keep: False where only the hidden states are wanted, not the keys (control states after the first).
    """

    ids: list[int]
    visuals: list[VisualInput] = field(default_factory=list)
    states: Tensor | None = None
    positions: Tensor | None = None
    keep: bool = True

    @property
    def num_outputs(self) -> int:
        """How many of its hidden states are wanted: the last one, or all where they are all there is to it."""
        return 1 if self.keep else len(self.ids)


@dataclass
class DecodeStep:
    """The inputs of all rows as one stage, of one segment a row.

    Attributes:
        ids: [N] packed tokens.
        stage: indices for `VPTModel.embed_inputs` and `extend`.
        visuals: source -> its visual inputs, in the order in which `stage.inserts` count their tokens.
        states: [r, D] control states that the stage refers to, or [r, (1 + k) D], as those of its inputs.
    """

    ids: Tensor
    stage: Stage
    visuals: dict[str, list[VisualInput]]
    states: Tensor


def pack_inputs(inputs: Sequence[RowInput], cached: Sequence[int], *, device: torch.device, like: Tensor) -> DecodeStep:
    """Pack one input of each row.

    Args:
        inputs: one for each row.
        cached: how many positions each row has cached.
        device: of the model.
        like: a tensor of the model's width and type, [..., D].
    """
    counts = [len(row_input.ids) for row_input in inputs]
    collector = InsertCollector(device, merge=False)
    visuals: dict[str, list[VisualInput]] = {}
    states = [like.new_zeros(0, like.shape[-1])]
    outputs: list[int] = []

    def add_states(added: Tensor | None) -> range:
        """Append control states; returns their numbers."""
        first = sum(map(len, states))
        states.extend(() if added is None else (added,))
        return range(first, sum(map(len, states)))

    for row_input, end in zip(inputs, accumulate(counts), strict=True):
        start = end - len(row_input.ids)
        outputs.extend(range(end - row_input.num_outputs, end))
        for position, state in enumerate(add_states(row_input.states), start=start):
            collector.add_control(position, state)
        for visual in row_input.visuals:
            earlier = visuals.setdefault(visual.span.source, [])
            first = sum(other.image.tokens for other in earlier)
            numbers = add_states(visual.control_states)
            collector.add_insert(visual.span, shift=start, first_token=first, states=numbers)
            earlier.append(visual)
    layout = AttentionLayout(counts, [n + c for n, c in zip(cached, counts, strict=True)], device=device)
    stage = collector.build(layout, logits_to_keep=outputs if len(outputs) < sum(counts) else None)
    ids = torch.tensor([token for row_input in inputs for token in row_input.ids], dtype=torch.long, device=device)
    width = max(part.shape[1] for part in states)
    return DecodeStep(ids, stage, visuals, torch.cat([F.pad(part, (0, width - part.shape[1])) for part in states]))
