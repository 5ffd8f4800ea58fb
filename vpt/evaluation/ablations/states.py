"""Ablations of the control state, which conditions re-encoded tokens."""

from collections.abc import Hashable, Sequence

import torch
from torch import Tensor, nn

from vpt.data.records import Record
from vpt.evaluation.ablations.base import Ablation, AblationContext, image_key
from vpt.evaluation.evaluator import answer_batch
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.questions import EvalQuestion
from vpt.evaluation.statistics import Estimate, Ratio, estimates
from vpt.evaluation.summary import Metrics
from vpt.generation.generator import Generator
from vpt.generation.row_state import IGNORED
from vpt.perception.requests import REGION


class StateZeroed(Ablation):
    """Control states are zero: as embeddings of the control tokens, and as what conditions the projector (which is left
    with one direction for all questions, that of its biases).
    """

    description = "control state zeroed"

    def applies_to(self, plain: Prediction) -> bool:
        return any(kind != REGION for kind in plain.actions)

    def states(self, states: Tensor, *, kind: str, record: Record) -> Tensor:
        return torch.zeros_like(states)


class StateShuffled(Ablation):
    """Control states are those that the model had for another question when it asked for the same kind of perception.
    Those questions are answered first, without ablation.
    """

    description = "control state of another question"

    def __init__(self, context: AblationContext, *, seed: int = 0, compared: int = 64) -> None:
        """`compared`: how many questions' states are compared with each other (`details`)."""
        super().__init__(context, seed=seed)
        bundle = context.bundle
        self.generator = Generator.from_config(
            bundle.model, bundle.processor, bundle.tokenizer, context.config.generation
        )
        self.compared = compared
        self.states_of: dict[tuple[int, str], Tensor] = {}  # of the current batch's donors: (question, kind)
        self.pools: dict[tuple[str, Hashable], list[int]] = {}  # questions whose answers ask for a kind, by `pool`
        for number, (question, item) in enumerate(zip(context.asked, context.plain, strict=True)):
            for kind in dict.fromkeys(item.actions):
                if kind != REGION:
                    self.pools.setdefault((kind, self.pool(question)), []).append(number)

    def pool(self, question: EvalQuestion) -> Hashable:
        """Questions for which this is the same may be given each other's states."""
        return None

    def applies_to(self, plain: Prediction) -> bool:
        return any(len(self._pool(plain.record, kind)) > 1 for kind in plain.actions)

    def on_batch(self, records: Sequence[Record]) -> None:
        kinds = {kind for kind, _ in self.pools}
        donors = {self._donor(record, kind) for record in records for kind in kinds if self._pool(record.where, kind)}
        self.states_of = self._answered(sorted(donors))

    def states(self, states: Tensor, *, kind: str, record: Record) -> Tensor:
        found = {number: theirs for (number, of), theirs in self.states_of.items() if of == kind}
        if not found or not self._pool(record.where, kind):  # no answer without ablation was ever shown it
            return torch.zeros_like(states)
        return found.get(self._donor(record, kind), next(iter(found.values())))

    def details(
        self, plain: Sequence[Prediction], changed: Sequence[Prediction], metrics: Metrics
    ) -> dict[str, Estimate]:
        """How alike control states are: each one's mean cosine with the others that could take its place. Near 1 they
        say next to nothing about the question.
        """
        pools: dict[str, list[list[int]]] = {}
        for (kind, _), pool in self.pools.items():
            pools.setdefault(kind, []).append(pool)
        return estimates({f"state_cosine_{kind}": self._likeness(kind, members) for kind, members in pools.items()})

    def _likeness(self, kind: str, pools: Sequence[Sequence[int]]) -> Ratio:
        """The mean cosine of each state with those of its pool, of the first `compared` questions."""
        numbers = sorted(number for pool in pools if len(pool) > 1 for number in pool)[: self.compared]
        states, cosines = self._answered(numbers), []
        for pool in pools:
            rows = [states[number, kind].float().flatten() for number in pool if (number, kind) in states]
            if len(rows) > 1:
                unit = nn.functional.normalize(torch.stack(rows), dim=1)
                cosines += ((unit @ unit.sum(dim=0) - 1) / (len(rows) - 1)).tolist()
        return Ratio.mean(cosines)

    def _answered(self, numbers: Sequence[int]) -> dict[tuple[int, str], Tensor]:
        """Control states by question and kind, the first of a kind where an answer asks for several."""
        states_of: dict[tuple[int, str], Tensor] = {}
        answers = answer_batch(self.generator, [self.context.asked[number] for number in numbers])
        for number, said in zip(numbers, answers, strict=True):
            kinds = [step.kind for step in said.trace if step.status != IGNORED and step.kind != REGION]
            for kind, states in zip(kinds, said.states, strict=True):
                states_of.setdefault((number, kind), states)
        return states_of

    def _pool(self, where: str, kind: str) -> list[int]:
        return self.pools.get((kind, self.pool(self.question_of[where])), [])

    def _donor(self, record: Record, kind: str) -> int:
        pool = self._pool(record.where, kind)
        place = self.rng(record.where, kind).randrange(len(pool))
        own = self.context.asked[pool[place]].record.where == record.where
        return pool[(place + own) % len(pool)]


class StateShuffledWithinImage(StateShuffled):
    """As `StateShuffled`, of another question about the same image: what differs is the question alone."""

    description = "control state of another question about the same image"

    def pool(self, question: EvalQuestion) -> Hashable:
        return image_key(question)
