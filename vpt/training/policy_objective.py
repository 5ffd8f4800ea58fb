"""The objective of reward learning: a step's batches are rollouts of the model as it is, its loss is a policy's.

Rollouts are a function of the weights and of the step's number, so that a run that was stopped draws the same ones
again. Each process draws the groups of its own prompts.
"""

from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from vpt.checkpoint.resume import WarmStart
from vpt.config.schema import TrainConfig
from vpt.config.validate import kinds_of
from vpt.data.build import build_train_mixture
from vpt.data.processor import Processor
from vpt.distributed.batch_alignment import GlobalCounts
from vpt.distributed.process_group import World
from vpt.distributed.strategy import Strategy
from vpt.errors import DataError
from vpt.evaluation.questions import EvalQuestion
from vpt.generation.generator import Generator
from vpt.models.build import ModelBundle
from vpt.models.output import Output
from vpt.perception.batch import Batch
from vpt.perception.requests import NONE
from vpt.rl.algorithms import ALGORITHMS
from vpt.rl.metrics import RolloutMetrics
from vpt.rl.rewards import RewardSum
from vpt.rl.rollouts import Rollout, draw_rollouts, rollout_batch
from vpt.training.objective import Objective
from vpt.training.reference_policy import ReferencePolicy


class PolicyObjective(Objective):
    """Rollouts of groups, their rewards and advantages, and the loss of `rl.algorithm`."""

    def __init__(
        self, config: TrainConfig, bundle: ModelBundle, processor: Processor, world: World, strategy: Strategy
    ) -> None:  # fmt: skip
        self.config, self.world, self.strategy = config, world, strategy  # no data set of labelled records
        self.device = bundle.model.device
        self.rl, self.model = config.rl, bundle.model
        self.reference = ReferencePolicy(bundle.model, WarmStart.of(config)) if self.rl.beta else None
        self.algorithm = ALGORITHMS[self.rl.algorithm](self.rl, max_new_tokens=config.generation.max_new_tokens)
        self.rewards = RewardSum(self.rl.rewards)
        settings = replace(config.generation, temperature=self.rl.temperature, seed=config.seed)
        self.generator = Generator.from_config(bundle.model, processor, bundle.tokenizer, settings)
        self.mixture, self.media = build_train_mixture(config)
        self.names = list(config.data.train)
        self.group_size, self.groups = self.rl.num_generations, config.training.batch_size // self.rl.num_generations
        kinds = [kind for kind in kinds_of(config) if kind != NONE]
        self._examples: list[dict[str, Any]] = []
        self.recorded = RolloutMetrics(world, kinds, [*self.rl.rewards], reference=bool(self.rl.beta))

    def batches(self, start: int) -> Iterator[list[Batch]]:
        steps, period = self.rl.steps_per_generation, self._period
        for draw in range(start // period, self.config.training.steps // period):
            with self.strategy.whole_weights(), self._autocast():
                drawn = self._draw(draw)
                shares = [drawn[step::steps] for step in range(steps)]
                prepared = [self._micro_batches([group for group in share if group]) for share in shares]
            for _ in range(self.rl.num_iterations):
                yield from prepared

    @property
    def _period(self) -> int:
        """Steps from one draw to the next."""
        return self.rl.steps_per_generation * self.rl.num_iterations

    def resumable(self, step: int) -> bool:
        return step % self._period == 0

    def _autocast(self) -> torch.autocast:
        """As in training: what draws, and what it is compared with, rounds as the policy does."""
        return torch.autocast(self.device.type, torch.bfloat16, enabled=self.config.training.precision != "fp32")

    def _draw(self, number: int) -> list[list[Rollout]]:
        """The groups of draw `number`, in the order of their prompts; those of other processes are empty.

        Groups of equal rewards are replaced by others while `rl.max_resamples` allows it.
        """
        wanted = self.groups * self.rl.steps_per_generation
        kept: list[list[Rollout]] = []
        for attempt in range(self.rl.max_resamples + 1):
            first = (number * (self.rl.max_resamples + 1) + attempt) * wanted
            groups = self._draw_groups(range(first, first + wanted))
            if not self.rl.max_resamples:
                return groups
            useful = [any(rollout.advantage for rollout in group) for group in groups]
            everywhere = self.world.all_reduce(torch.tensor(useful, dtype=torch.float64)).tolist()
            kept += [group for group, use in zip(groups, everywhere, strict=True) if use]
            if len(kept) >= wanted:
                break
        return kept[:wanted]

    def _draw_groups(self, numbers: Sequence[int]) -> list[list[Rollout]]:
        """A group of rollouts for the prompt of each number; empty for those that are another process's."""
        own = [n for place, n in enumerate(numbers) if place % self.world.size == self.world.rank]
        questions = [self._question(number) for number in own]
        size, most = self.group_size, max(1, self.config.generation.batch_size // self.group_size)
        self.model.eval()
        groups: list[list[Rollout]] = []
        for start in range(0, len(own), most):
            rows = [range(n * size, (n + 1) * size) for n in own[start : start + most]]
            groups += draw_rollouts(self.generator, questions[start : start + most], numbers=rows)
        valued = dict(zip(own, map(self._value, groups), strict=True))
        return [valued.get(number, []) for number in numbers]

    def _question(self, number: int) -> EvalQuestion:
        place = self.mixture.sample_at(number)
        record = self.mixture.sources[place.source][place.index]
        if not record.question or not (record.answer or record.accepted):
            raise DataError(f"{record.where}: reward learning needs a question and its answer; leave such records out")
        return EvalQuestion(record, self.media[place.source], self.names[place.source], number)

    def _value(self, group: list[Rollout]) -> list[Rollout]:
        """The rollouts of a group that can teach something, with their advantages."""
        rewards, parts = self.rewards(group)
        counts = torch.tensor([
            bool(one.draws) and (one.prediction.complete or not self.rl.mask_truncated_completions) for one in group
        ])  # fmt: skip
        advantages = torch.zeros(len(group), dtype=torch.float64)
        if int(counts.sum()) > 1:
            advantages[counts] = self.algorithm.advantages(rewards[counts].double())
        self.recorded.add_group(group, rewards, parts)
        self._examples = [
            asdict(one.prediction)
            | {"reward": reward, "advantage": advantage, "perceived_tokens": one.perceived_tokens}
            for one, reward, advantage in zip(group, rewards.tolist(), advantages.tolist(), strict=True)
        ]
        return [
            replace(rollout, advantage=advantage)
            for rollout, advantage, count in zip(group, advantages.tolist(), counts.tolist(), strict=True)
            if count and (advantage or self.algorithm.needs_all)
        ]

    def _micro_batches(self, groups: Sequence[list[Rollout]]) -> list[Batch]:
        """Batches of at most `training.micro_batch_size` rollouts, equally many on all processes."""
        size = self.config.training.micro_batch_size
        pieces = [group[at : at + size] for group in groups for at in range(0, len(group), size)]
        packs: list[list[list[Rollout]]] = []
        for piece in pieces:
            if packs and sum(map(len, packs[-1])) + len(piece) <= size:
                packs[-1].append(piece)
            else:
                packs.append([piece])
        batches = [self._batch(pack) for pack in packs]
        most = int(self.world.all_gather([len(batches)]).max())
        return [*batches, *(Batch.empty() for _ in range(most - len(batches)))]

    def _batch(self, pack: list[list[Rollout]]) -> Batch:
        batch = rollout_batch(
            pack, self.generator.constraints.forbidden, temperature=self.rl.temperature,
            share_prompts=self.rl.share_prompts,
        ).to(self.device)  # fmt: skip
        if self.reference is not None:
            assert batch.rollouts is not None
            batch.rollouts.ref_log_probs = self.reference.log_probs(batch)
        return batch

    def loss(self, batch: Batch, output: Output, totals: GlobalCounts) -> Tensor:
        if batch.rollouts is None:  # of dummy rows alone
            return output.loss_sum
        found = self.algorithm(-output.nll, batch.rollouts, totals)
        self.recorded.add_tokens(output, batch.rollouts, found)
        return found.loss if output.grad_anchor is None else found.loss + output.grad_anchor

    def examples(self) -> list[dict[str, Any]]:
        return self._examples

    def metrics(self) -> dict[str, float]:
        return self.recorded.compute()


def build_objective(
    config: TrainConfig, bundle: ModelBundle, processor: Processor, world: World, strategy: Strategy
) -> Objective:  # fmt: skip
    """The objective that a run is configured for."""
    if config.rl.algorithm == "none":
        return Objective(config, processor, world, bundle.model.device)
    return PolicyObjective(config, bundle, processor, world, strategy)
