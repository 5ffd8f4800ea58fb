"""Advantages and losses of policy gradient algorithms, each a few lines of formulas.

A group is G rollouts of one prompt with rewards r_1 ... r_G. Rollout i has n_i drawn tokens; lp, old and ref are their
log-probabilities under the policy, the policy that drew them, and the reference. Every loss is a weighted sum over
drawn tokens; the weights are those of the whole optimizer step, so that how it is cut into micro-batches, and over how
many processes it is spread, changes nothing (`totals`: its rollouts, and its drawn tokens as labels).
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from vpt.config.rl import RLConfig
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.perception.rollouts import RolloutTokens

EPSILON = 1e-4  # added to a standard deviation


@dataclass(frozen=True)
class PolicyLoss:
    """The loss of a micro-batch, its part of the step's, and what there is to log of its M tokens.

    Attributes:
        loss: a scalar.
        clipped_low, clipped_high: [M] the ratio left the interval downwards where the advantage is negative, upwards
            where it is positive, so that the token has no gradient.
        kl: [M] the estimate of the divergence from the reference, None without one.
    """

    loss: Tensor
    clipped_low: Tensor
    clipped_high: Tensor
    kl: Tensor | None = None


class GRPO:
    """Group relative policy optimization (Shao et al., arXiv 2402.03300, eq. 3 and 4).

    A_i = (r_i - mean r) / (std r + 1e-4), std with G - 1; the clipped surrogate of PPO (arXiv 1707.06347, eq. 7) with
    1 - epsilon and 1 + epsilon_high, optionally the dual clip (arXiv 1912.09729, eq. 5); mean over tokens, then over
    rollouts.
    """

    needs_all: ClassVar[bool] = True  # False: rollouts without an advantage are left out of the loss and its counts

    def __init__(self, config: RLConfig, *, max_new_tokens: int) -> None:
        self.config, self.max_new_tokens = config, max_new_tokens
        self.low, self.high = 1 - config.epsilon, 1 + (config.epsilon_high or config.epsilon)

    def advantages(self, rewards: Tensor) -> Tensor:
        """Of one group, [G] -> [G]; 0 where there is but one rollout, or all are worth the same."""
        if len(rewards) < 2 or bool((rewards == rewards[0]).all()):
            return torch.zeros_like(rewards)
        return (rewards - rewards.mean()) / (rewards.std() + EPSILON)

    def log_ratio(self, log_probs: Tensor, tokens: RolloutTokens) -> Tensor:
        """[M]: lp - old of each token."""
        return log_probs - tokens.log_probs

    def token_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        """[M]: -min(ratio A, clip(ratio) A); with the dual clip never above -delta A where A is negative."""
        loss = -torch.minimum(ratio * advantages, ratio.clamp(self.low, self.high) * advantages)
        if self.config.delta is None:
            return loss
        return torch.where(advantages < 0, torch.minimum(loss, -self.config.delta * advantages), loss)

    def weights(self, lengths: Tensor, totals: GlobalCounts) -> Tensor:
        """What a token of each rollout counts, [R], given the rollouts' drawn tokens, [R]."""
        return 1 / (lengths * totals.rollouts)

    def __call__(self, log_probs: Tensor, tokens: RolloutTokens, totals: GlobalCounts) -> PolicyLoss:
        """The loss of a micro-batch, given [M] log-probabilities under the policy and the counts of the whole step."""
        advantages = tokens.advantages[tokens.rollout].to(log_probs.dtype)
        lengths = tokens.rollout.bincount(minlength=len(tokens.advantages)).clamp(min=1).double()
        ratio = self.log_ratio(log_probs, tokens).clamp(-20, 20).exp()
        losses = self.token_loss(ratio, log_probs, advantages)
        kl = None
        if tokens.ref_log_probs is not None:  # the estimator k3 (Schulman, 2020): never negative, unbiased
            gap = tokens.ref_log_probs - log_probs
            kl = gap.exp() - gap - 1
            losses = losses + self.config.beta * kl
        weights = self.weights(lengths, totals).to(losses.dtype)[tokens.rollout]
        return PolicyLoss(
            (losses * weights).sum(), (ratio < self.low) & (advantages < 0), (ratio > self.high) & (advantages > 0), kl
        )


class DrGRPO(GRPO):
    """GRPO done right (Liu et al., arXiv 2503.20783, section 3.2): A_i = r_i - mean r, without the deviation; the sum
    over tokens divided by a constant, `generation.max_new_tokens`, so that long wrong answers cost more."""

    def advantages(self, rewards: Tensor) -> Tensor:
        return rewards - rewards.mean()

    def weights(self, lengths: Tensor, totals: GlobalCounts) -> Tensor:
        return torch.full_like(lengths, 1 / (totals.rollouts * self.max_new_tokens))


class DAPO(GRPO):
    """Decoupled clip and dynamic sampling (Yu et al., arXiv 2503.14476, eq. 8): GRPO's advantages, the mean over all
    tokens of the step. Type `rl.epsilon_high=0.28` and `rl.max_resamples=3` for the paper's other two parts."""

    def weights(self, lengths: Tensor, totals: GlobalCounts) -> Tensor:
        return torch.full_like(lengths, 1 / totals.labels)


class GSPO(GRPO):
    """Group sequence policy optimization (Zheng et al., arXiv 2507.18071, eq. 5 to 7): one ratio for a rollout, the
    geometric mean of its tokens' ratios, clipped as a whole. The paper's epsilon is 3e-4, epsilon_high 4e-4."""

    def log_ratio(self, log_probs: Tensor, tokens: RolloutTokens) -> Tensor:
        """[M]: the mean over its rollout, for each token, with the rollout's whole gradient spread evenly."""
        delta, count = log_probs - tokens.log_probs, len(tokens.advantages)
        sums = delta.new_zeros(count).index_add(0, tokens.rollout, delta)
        lengths = tokens.rollout.bincount(minlength=count).clamp(min=1)
        return (sums / lengths)[tokens.rollout]


class CISPO(DAPO):
    """Clipped importance sampling (MiniMax, arXiv 2506.13585, eq. 4 and 5): -sg(min(ratio, 1 + epsilon_high)) A lp, so
    that no token loses its gradient; the mean over all tokens of the step."""

    def token_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        return -ratio.detach().clamp(max=self.high) * advantages * log_probs


class RLOO(GRPO):
    """REINFORCE leave-one-out (Ahmadian et al., arXiv 2402.14740, eq. 4): A_i = r_i - the mean of the others; the whole
    answer is one action, so tokens are added up, and rollouts averaged. Clipped as PPO for several steps a draw."""

    def advantages(self, rewards: Tensor) -> Tensor:
        if len(rewards) < 2:
            return torch.zeros_like(rewards)
        return (rewards - rewards.mean()) * (len(rewards) / (len(rewards) - 1))

    def weights(self, lengths: Tensor, totals: GlobalCounts) -> Tensor:
        return torch.full_like(lengths, 1 / totals.rollouts)


class RFT(DAPO):
    """Rejection sampling, then supervised (Yuan et al., arXiv 2308.01825): the best rollouts of a group that are worth
    more than nothing are learned as if they were records, the others not at all; the mean over all their tokens."""

    needs_all = False

    def advantages(self, rewards: Tensor) -> Tensor:
        return ((rewards == rewards.max()) & (rewards > 0)).to(rewards.dtype)

    def token_loss(self, ratio: Tensor, log_probs: Tensor, advantages: Tensor) -> Tensor:
        return -advantages * log_probs


class DPO(GRPO):
    """Direct preference optimization (Rafailov et al., arXiv 2305.18290, eq. 7) on a pair of each group, its best and
    its worst rollout: -log sigmoid(beta ((lp - ref of the best) - (lp - ref of the worst))); tokens are added up, pairs
    averaged."""

    needs_all = False

    def advantages(self, rewards: Tensor) -> Tensor:
        """1 for the best, -1 for the worst, 0 for the others, and for all where there is no difference."""
        chosen = torch.zeros_like(rewards)
        if bool((rewards != rewards[0]).any()):
            chosen[rewards.argmax()], chosen[rewards.argmin()] = 1.0, -1.0
        return chosen

    def __call__(self, log_probs: Tensor, tokens: RolloutTokens, totals: GlobalCounts) -> PolicyLoss:
        """As GRPO's; the two rollouts of a pair follow each other."""
        assert tokens.ref_log_probs is not None
        sums = log_probs.new_zeros(len(tokens.advantages))
        sums = sums.index_add(0, tokens.rollout, log_probs - tokens.ref_log_probs)
        margins = (sums * tokens.advantages.sign()).view(-1, 2).sum(dim=1)
        losses = -torch.nn.functional.logsigmoid(self.config.beta * margins)
        none = torch.zeros_like(log_probs, dtype=torch.bool)
        return PolicyLoss(losses.sum() * 2 / totals.rollouts, none, none)


ALGORITHMS: dict[str, type[GRPO]] = {
    "grpo": GRPO, "dr_grpo": DrGRPO, "dapo": DAPO, "gspo": GSPO, "cispo": CISPO, "rloo": RLOO, "rft": RFT,
    "dpo": DPO,
}  # fmt: skip
