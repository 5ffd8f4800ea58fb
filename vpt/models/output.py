"""The model's output, and token losses computed in chunks of positions."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from vpt.perception.batch import Batch

LOGIT_CHUNK = 1024  # labelled positions whose logits exist at a time


@dataclass
class Output:
    """Predictions at labelled positions, in the order of the batch.

    Attributes:
        nll: [M] negative log-likelihood of each labelled token.
        correct: [M] whether the likeliest token is the label.
        targets: [M] the labels.
        positions: [M] the position in the batch that each label is predicted from.
        control_states: [r, D] the control states, in the order in which they were read.
        logits: [M, vocabulary], if asked for.
        grad_anchor: zero, but the gradient of every stage leads through it; None without `uniform_backward`.
    """

    nll: Tensor
    correct: Tensor
    targets: Tensor
    positions: Tensor
    control_states: Tensor
    logits: Tensor | None = None
    grad_anchor: Tensor | None = None

    @property
    def loss_sum(self) -> Tensor:
        """Sum over labelled tokens; divide by the count over the *global* batch, never take a mean of means."""
        return self.nll.sum() if self.grad_anchor is None else self.nll.sum() + self.grad_anchor


def compute_outputs(
    logits_of: Callable[[Tensor], Tensor], batch: Batch, hidden: Tensor, states: Tensor, *, keep_logits: bool
) -> Output:
    """Next-token predictions where there is a label, and only there: the vocabulary is 152 k wide.

    Args:
        logits_of: [n, D] -> [n, vocabulary].
        batch: the batch that was run.
        hidden: [M, D] at the positions that predict a label.
        states: the control states.
        keep_logits: whether the logits are wanted too.
    """

    def token_loss(hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        logits = logits_of(hidden)
        return F.cross_entropy(logits, targets, reduction="none"), logits.argmax(dim=-1) == targets

    positions = torch.from_numpy(batch.loss_positions).to(hidden.device, non_blocking=True)
    targets = batch.labels[positions + 1]
    recompute = len(positions) > LOGIT_CHUNK and not keep_logits and torch.is_grad_enabled()
    nll, correct, logits = [], [], []
    for part, target in zip(hidden.split(LOGIT_CHUNK), targets.split(LOGIT_CHUNK), strict=True):
        scores = checkpoint(token_loss, part, target, use_reentrant=False) if recompute else token_loss(part, target)
        nll.append(scores[0])
        correct.append(scores[1])
        if keep_logits:
            logits.append(logits_of(part))
    empty = hidden.new_zeros(0)
    return Output(
        nll=torch.cat(nll) if nll else empty, correct=torch.cat(correct) if correct else empty.bool(), targets=targets,
        positions=positions, control_states=states, logits=torch.cat(logits) if logits else None,
    )  # fmt: skip
