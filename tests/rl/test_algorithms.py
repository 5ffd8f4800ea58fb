"""Losses, gradients and advantages of every algorithm against loops over Python's floats and float64 tensors."""

import math
import statistics

import pytest
import torch

from helpers.multiprocess import on_ranks
from vpt.config.rl import RLConfig
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.perception.rollouts import RolloutTokens
from vpt.rl.algorithms import ALGORITHMS

MAX_NEW_TOKENS = 10
REWARDS = [[1.0, 0.0, 0.5, 0.0], [0.0, 1.0, 1.0], [1.0, 1.0]]
SETTINGS = {"epsilon": 0.2, "epsilon_high": 0.3}


def reference_advantages(name, rewards):
    mean, n = statistics.fmean(rewards), len(rewards)
    if name in ("grpo", "dapo", "gspo", "cispo"):
        deviation = statistics.stdev(rewards)
        return [(r - mean) / (deviation + 1e-4) if deviation else 0.0 for r in rewards]
    if name == "dr_grpo":
        return [r - mean for r in rewards]
    if name == "rloo":
        return [r - (sum(rewards) - r) / (n - 1) for r in rewards]
    return [1.0 if r == max(rewards) and r > 0 else 0.0 for r in rewards]  # rft


def reference_loss(name, rollouts, config):
    """The loss of a step from its rollouts: (advantage, lp, old, ref), each of lists of 0-d tensors."""
    total_tokens, count = sum(len(lp) for _, lp, _, _ in rollouts), len(rollouts)
    loss = torch.zeros((), dtype=torch.float64)
    for advantage, lp, old, ref in rollouts:
        mean_ratio = torch.exp(sum(a - b for a, b in zip(lp, old)) / len(lp))
        for a, b, r in zip(lp, old, ref):
            ratio = mean_ratio if name == "gspo" else torch.exp(a - b)
            clipped = min(max(ratio, ratio * 0 + 1 - 0.2), ratio * 0 + 1 + 0.3)
            if name == "cispo":
                token = -min(ratio.item(), 1.3) * advantage * a
            elif name == "rft":
                token = -advantage * a
            else:
                token = -min(ratio * advantage, clipped * advantage)
                if config.delta is not None and advantage < 0:
                    token = min(token, token * 0 - config.delta * advantage)
            if config.beta:
                token = token + config.beta * (torch.exp(r - a) - (r - a) - 1)
            weight = {
                "grpo": 1 / (count * len(lp)), "gspo": 1 / (count * len(lp)), "dapo": 1 / total_tokens,
                "cispo": 1 / total_tokens, "rft": 1 / total_tokens, "dr_grpo": 1 / (count * MAX_NEW_TOKENS),
                "rloo": 1 / count,
            }[name]  # fmt: skip
            loss = loss + weight * token
    return loss


def drawn(seed=0):
    """Log-probabilities of rollouts of several lengths: policy, drawn, reference; some ratios are far from 1."""
    generator = torch.Generator().manual_seed(seed)
    lengths = [1, 4, 7, 2, 3, 5, 1, 2, 6]
    make = lambda: [torch.randn(n, generator=generator, dtype=torch.float64) for n in lengths]  # noqa: E731
    old = [x - 2 for x in make()]
    return [x + 0.4 * y for x, y in zip(old, make())], old, [x + 0.2 * y for x, y in zip(old, make())]


def tokens_of(advantages, old, ref, *, beta):
    lengths = torch.tensor([len(x) for x in old])
    rollout = torch.repeat_interleave(torch.arange(len(old)), lengths)
    none = torch.zeros(1, 4, dtype=torch.bool)
    return RolloutTokens(
        none, torch.zeros(len(rollout), dtype=torch.long), rollout, torch.tensor(advantages, dtype=torch.float64),
        torch.cat(old), torch.cat(ref) if beta else None,
    )  # fmt: skip


NAMES = [name for name in ALGORITHMS if name != "dpo"]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("extra", [{}, {"delta": 1.2}, {"beta": 0.04}], ids=str)
@pytest.mark.parametrize("cuts", [[9], [4, 3, 2], [1] * 9], ids=str)
def test_loss_and_gradient_for_any_micro_batches(name, extra, cuts):
    config = RLConfig(algorithm=name, **SETTINGS, **extra)
    algorithm = ALGORITHMS[name](config, max_new_tokens=MAX_NEW_TOKENS)
    advantages = [float(a) for rewards in REWARDS for a in algorithm.advantages(torch.tensor(rewards).double())]
    torch.testing.assert_close(
        torch.tensor(advantages), torch.tensor([a for rewards in REWARDS for a in reference_advantages(name, rewards)])
    )
    policy, old, ref = drawn()
    leaves = [[x.clone().requires_grad_() for x in lp] for lp in policy]
    want = reference_loss(name, list(zip(advantages, leaves, old, ref)), config)
    want_gradients = torch.autograd.grad(want, [x for lp in leaves for x in lp], allow_unused=True)
    totals, start, got = GlobalCounts(rollouts=9, labels=sum(map(len, old))), 0, 0.0
    whole = [lp.clone().requires_grad_() for lp in policy]
    for size in cuts:
        part = slice(start, start + size)
        tokens = tokens_of(advantages[part], old[part], ref[part], beta=config.beta)
        loss = algorithm(torch.cat(whole[part]), tokens, totals).loss
        loss.backward()
        got, start = got + loss.item(), start + size
    assert math.isclose(got, want.item(), rel_tol=1e-9, abs_tol=1e-12)
    found = torch.cat([lp.grad for lp in whole])
    expected = torch.stack([torch.zeros((), dtype=torch.float64) if g is None else g for g in want_gradients])
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-12)


SHARES = [slice(0, 4), slice(4, 7), slice(7, 9), slice(9, 9)]  # of nine rollouts, over four processes


def losses_on_rank(world, settings):
    """For each algorithm, this process's part of the loss, and the gradient of its own rollouts' log-probabilities."""
    found, part = {}, SHARES[world.rank]
    for name in NAMES:
        config = RLConfig(algorithm=name, **settings)
        algorithm = ALGORITHMS[name](config, max_new_tokens=MAX_NEW_TOKENS)
        advantages = [float(a) for rewards in REWARDS for a in algorithm.advantages(torch.tensor(rewards).double())][
            part
        ]
        policy, old, ref = (one[part] for one in drawn())
        counts = world.all_reduce(torch.tensor([len(policy), sum(map(len, policy))], dtype=torch.float64)).tolist()
        if not policy:  # as in training, a process without rollouts has no loss, and takes part in what is counted
            found[name] = [0.0, []]
            continue
        leaves = torch.cat(policy).requires_grad_()
        tokens = tokens_of(advantages, old, ref, beta=config.beta)
        loss = algorithm(leaves, tokens, GlobalCounts(rollouts=int(counts[0]), labels=int(counts[1]))).loss
        loss.backward()
        found[name] = [loss.item(), leaves.grad.tolist()]
    return found


@pytest.mark.slow
def test_four_processes_have_the_reference_loss_and_gradient(tmp_path):
    """Added up over processes of four, three, two and no rollouts, to the last digits of float64."""
    settings = SETTINGS | {"beta": 0.04, "delta": 1.2}
    ranks = on_ranks(4, losses_on_rank, settings, folder=tmp_path)
    for name in NAMES:
        config = RLConfig(algorithm=name, **settings)
        policy, old, ref = drawn()
        leaves = [x.requires_grad_() for x in policy]
        advantages = [a for rewards in REWARDS for a in reference_advantages(name, rewards)]
        want = reference_loss(name, list(zip(advantages, leaves, old, ref)), config)
        gradients = torch.autograd.grad(want, leaves)
        assert math.isclose(sum(rank[name][0] for rank in ranks), want.item(), rel_tol=1e-9, abs_tol=1e-12), name
        found = torch.tensor([number for rank in ranks for number in rank[name][1]], dtype=torch.float64)
        torch.testing.assert_close(found, torch.cat(gradients), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", ["grpo", "dr_grpo", "dapo", "gspo", "cispo", "rloo"])
def test_a_fresh_policy_has_ratio_one_and_the_policy_gradient(name):
    """Where nothing has changed since the draw, no token is clipped, and the gradient is that of -A lp."""
    algorithm = ALGORITHMS[name](RLConfig(algorithm=name), max_new_tokens=MAX_NEW_TOKENS)
    _, old, ref = drawn()
    advantages = [1.0, -2.0, 0.5, 0.0, 1.0, -1.0, 3.0, 0.25, -0.5]
    tokens = tokens_of(advantages, old, ref, beta=0.0)
    lp = torch.cat(old).clone().requires_grad_()
    found = algorithm(lp, tokens, GlobalCounts(rollouts=9, labels=len(lp)))
    found.loss.backward()
    assert not found.clipped_low.any()
    assert not found.clipped_high.any()
    lengths = tokens.rollout.bincount().double()
    weights = algorithm.weights(lengths, GlobalCounts(rollouts=9, labels=len(lp))).double()
    torch.testing.assert_close(lp.grad, -(tokens.advantages * weights)[tokens.rollout], rtol=1e-9, atol=1e-12)


def test_dpo():
    """-log sigmoid(beta (margin of the best - margin of the worst)), by hand."""
    config = RLConfig(algorithm="dpo", beta=0.1)
    algorithm = ALGORITHMS["dpo"](config, max_new_tokens=MAX_NEW_TOKENS)
    assert algorithm.advantages(torch.tensor([0.5, 0.0, 1.0, 0.2])).tolist() == [0, -1, 1, 0]
    assert algorithm.advantages(torch.tensor([1.0, 1.0])).tolist() == [0, 0]
    lp, ref = [torch.tensor([-1.0, -2.0]), torch.tensor([-0.5])], [torch.tensor([-1.5, -2.5]), torch.tensor([-0.1])]
    tokens = tokens_of([1.0, -1.0], lp, ref, beta=0.1)
    loss = algorithm(torch.cat(lp), tokens, GlobalCounts(rollouts=4, labels=6)).loss  # another process has a pair, too
    margin = 0.1 * ((-3.0 + 4.0) - (-0.5 + 0.1))
    assert math.isclose(loss.item(), -math.log(1 / (1 + math.exp(-margin))) / 2, rel_tol=1e-6)


def test_groups_that_teach_nothing():
    for name in NAMES:
        algorithm = ALGORITHMS[name](RLConfig(algorithm=name), max_new_tokens=MAX_NEW_TOKENS)
        assert algorithm.advantages(torch.zeros(4)).tolist() == [0.0] * 4, name
    grpo = ALGORITHMS["grpo"](RLConfig(), max_new_tokens=MAX_NEW_TOKENS)
    assert grpo.advantages(torch.full((3,), 0.1)).tolist() == [0.0] * 3, "rounding is no variance"


@pytest.mark.parametrize("name", [*NAMES, "dpo"])
def test_a_bandit_is_solved(name):
    """One prompt, four answers of which one is right: the policy comes to prefer it."""
    config = RLConfig(algorithm=name, beta=0.1 if name == "dpo" else 0.0)
    algorithm = ALGORITHMS[name](config, max_new_tokens=1)
    logits = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.Adam([logits], lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(60):
        log_probs = logits.log_softmax(dim=-1)
        chosen = torch.multinomial(log_probs.detach().exp(), 8, replacement=True, generator=generator)
        advantages = algorithm.advantages((chosen == 2).double())
        kept = advantages.nonzero().flatten() if not algorithm.needs_all else torch.arange(8)
        if not len(kept):
            continue
        old = [lp[None] for lp in log_probs.detach()[chosen[kept]]]
        ref = [torch.full((1,), math.log(0.25), dtype=torch.float64)] * len(kept)
        tokens = tokens_of(advantages[kept].tolist(), old, ref, beta=config.beta)
        optimizer.zero_grad()
        algorithm(log_probs[chosen[kept]], tokens, GlobalCounts(rollouts=len(kept), labels=len(kept))).loss.backward()
        optimizer.step()
    assert logits.softmax(dim=-1)[2] > 0.9
