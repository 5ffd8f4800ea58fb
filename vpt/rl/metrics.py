"""Metrics of rollouts and of the policy's loss, named as trl has them, under `rl/`."""

import json
from collections import defaultdict
from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.distributed.process_group import World
from vpt.models.output import Output
from vpt.perception.rollouts import RolloutTokens
from vpt.rl.algorithms import PolicyLoss
from vpt.rl.rollouts import Rollout, looked


class RolloutMetrics:
    """Means since the last logged step, over all processes."""

    def __init__(self, world: World, kinds: Sequence[str], rewards: Sequence[str], *, reference: bool = False) -> None:
        """`kinds` of perception, names of rewards, whether there is a `reference`: all processes log the same."""
        self.world = world
        looks = [f"look_rate/{kind}" for kind in kinds]
        per_rollout = ["reward", "reward_squared", *(f"rewards/{name}" for name in rewards), "look_rate", *looks,
                       "perceived_tokens", "completions/length", "completions/clipped_ratio"]  # fmt: skip
        self.kinds, self.names = list(kinds), {
            "rollouts": per_rollout, "groups": ["frac_reward_zero_std"],
            "tokens": ["clip_ratio/low", "clip_ratio/high", "entropy", "log_prob_difference", *["kl"] * reference],
        }  # fmt: skip
        self._reset()

    def _reset(self) -> None:
        self._sums: dict[str, float] = defaultdict(float)
        self._largest = 0.0
        self._types: dict[str, list[bool]] = defaultdict(list)  # whether rollouts looked, by type of question

    def add_group(self, group: Sequence[Rollout], rewards: Tensor, parts: dict[str, Tensor]) -> None:
        """Count a group that was drawn, and what its rollouts are worth."""
        self._add(
            "rollouts", len(group), reward=rewards, reward_squared=rewards.double() ** 2,
            **{f"rewards/{name}": values for name, values in parts.items()},
            look_rate=torch.tensor([looked(one) for one in group]),
            **{f"look_rate/{kind}": torch.tensor([looked(one, kind) for one in group]) for kind in self.kinds},
            perceived_tokens=torch.tensor([one.perceived_tokens for one in group]),
            **{"completions/length": torch.tensor([len(one.draws) for one in group]),
               "completions/clipped_ratio": torch.tensor([not one.prediction.complete for one in group])},
        )  # fmt: skip
        for one in group:
            self._types[one.prediction.type].append(looked(one))
        self._add("groups", 1, frac_reward_zero_std=(rewards == rewards[0]).all()[None])

    def add_tokens(self, output: Output, tokens: RolloutTokens, found: PolicyLoss) -> None:
        """Count the tokens of a micro-batch that was trained on."""
        difference = (-output.nll.detach() - tokens.log_probs).abs()
        assert output.entropy is not None
        self._largest = max(self._largest, float(difference.max())) if len(difference) else self._largest
        self._add(
            "tokens", len(difference), entropy=output.entropy, log_prob_difference=difference,
            **{"clip_ratio/low": found.clipped_low, "clip_ratio/high": found.clipped_high},
            **({} if found.kl is None else {"kl": found.kl.detach()}),
        )  # fmt: skip

    def _add(self, kind: str, count: int, **values: Tensor) -> None:
        self._sums[kind] += count
        for name, value in values.items():
            self._sums[name] += float(value.double().sum())

    def compute(self) -> dict[str, float]:
        """All metrics since the last call. A collective."""
        names = [*self.names, *(name for own in self.names.values() for name in own)]
        own = torch.tensor([self._sums[name] for name in names], dtype=torch.float64)
        sums = dict(zip(names, self.world.all_reduce(own).tolist(), strict=True))
        look_rates = self._look_rates()
        largest = int(self.world.all_gather([round(self._largest * 1e9)]).max()) / 1e9  # whole numbers travel
        self._reset()
        means = {name: sums[name] / max(sums[kind], 1) for kind, own in self.names.items() for name in own}
        variance = means.pop("reward_squared") - means["reward"] ** 2
        means["reward_std"] = max(variance, 0.0) ** 0.5
        means["log_prob_difference/max"] = largest
        return {f"rl/{name}": value for name, value in (means | look_rates).items()}

    def _look_rates(self) -> dict[str, float]:
        """The share of rollouts that looked, for each type of question, where there is more than one. A collective."""
        own = {name: [sum(found), len(found)] for name, found in self._types.items()}
        counts: dict[str, list[int]] = {}
        for text in self.world.all_gather_text(json.dumps(own)):
            for name, (seen, total) in json.loads(text).items():
                before = counts.get(name, [0, 0])
                counts[name] = [before[0] + seen, before[1] + total]
        rates = {f"look_rate/type/{name.replace(' ', '_')}": seen / total for name, (seen, total) in counts.items()}
        return dict(sorted(rates.items())) if len(rates) > 1 else {}
