"""Ablations of the control state, which conditions re-encoded tokens."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.data.records import Record
from vpt.evaluation.ablations.base import Ablation, AblationContext
from vpt.evaluation.evaluator import answer_batch
from vpt.evaluation.predictions import Prediction
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

    def __init__(self, setting: AblationContext, *, seed: int = 0) -> None:
        super().__init__(setting, seed=seed)
        parts = setting.parts
        self.generator = Generator.from_config(parts.model, parts.processor, parts.tokenizer, setting.config.generation)
        self.states_of: dict[tuple[int, str], Tensor] = {}  # of the current batch's donors: (question, kind)
        self.asking: dict[str, list[int]] = {}  # kind -> questions whose answers ask for it
        for number, item in enumerate(setting.plain):
            for kind in dict.fromkeys(item.actions):
                self.asking.setdefault(kind, []).append(number)
        self.asking.pop(REGION, None)

    def applies_to(self, plain: Prediction) -> bool:
        return any(len(self.asking.get(kind, ())) > 1 for kind in plain.actions)

    def on_batch(self, records: Sequence[Record]) -> None:
        donors = sorted({self._donor(record, kind) for record in records for kind in self.asking})
        self.states_of = {}
        for number, said in zip(
            donors, answer_batch(self.generator, [self.context.asked[n] for n in donors]), strict=True
        ):
            kinds = [step.kind for step in said.trace if step.status != IGNORED and step.kind != REGION]
            for kind, states in zip(kinds, said.states, strict=True):
                self.states_of.setdefault((number, kind), states)

    def states(self, states: Tensor, *, kind: str, record: Record) -> Tensor:
        found = {number: theirs for (number, of), theirs in self.states_of.items() if of == kind}
        if not found:  # no answer without ablation was ever shown it
            return torch.zeros_like(states)
        return found.get(self._donor(record, kind), next(iter(found.values())))

    def _donor(self, record: Record, kind: str) -> int:
        pool = self.asking[kind]
        place = self.rng(record.where, kind).randrange(len(pool))
        own = self.context.asked[pool[place]].record.where == record.where
        return pool[(place + own) % len(pool)]
