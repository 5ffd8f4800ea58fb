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
        entropy: [M] of what each label was drawn from; of rollouts only.
        logits: [M, vocabulary], if asked for.
        grad_anchor: zero, but the gradient of every stage leads through it; None without `uniform_backward`.
    """

    nll: Tensor
    correct: Tensor
    targets: Tensor
    positions: Tensor
    control_states: Tensor
    entropy: Tensor | None = None
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

    rollouts = batch.rollouts

    def token_loss(hidden: Tensor, targets: Tensor, constraint: Tensor) -> tuple[Tensor, ...]:
        logits = logits_of(hidden)
        correct = logits.argmax(dim=-1) == targets
        if rollouts is None:
            return F.cross_entropy(logits, targets, reduction="none"), correct
        log_probs = rollouts.log_softmax(logits, constraint)
        entropy = -(log_probs.detach().exp() * log_probs.detach().nan_to_num(neginf=0.0)).sum(dim=-1)
        return F.nll_loss(log_probs, targets, reduction="none"), correct, entropy

    positions = torch.from_numpy(batch.loss_positions).to(hidden.device, non_blocking=True)
    targets = batch.labels[positions + 1]
    recompute = len(positions) > LOGIT_CHUNK and not keep_logits and torch.is_grad_enabled()
    constraints = targets if rollouts is None else rollouts.constraint  # what plain labels ignore
    scores, logits = [], []
    for chunk in zip(*(x.split(LOGIT_CHUNK) for x in (hidden, targets, constraints)), strict=True):
        scores.append(checkpoint(token_loss, *chunk, use_reentrant=False) if recompute else token_loss(*chunk))
        if keep_logits:
            logits.append(logits_of(chunk[0]))
    empty = hidden.new_zeros(0)
    nll, correct, *rest = map(torch.cat, zip(*scores)) if scores else (empty, empty.bool())
    return Output(
        nll=nll, correct=correct, targets=targets, positions=positions, control_states=states,
        entropy=rest[0] if rest else None, logits=torch.cat(logits) if logits else None,
    )  # fmt: skip
