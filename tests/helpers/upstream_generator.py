"""Decoding as the authors' code does, for the golden cases."""

from torch import Tensor

from vpt.generation.decode_step import RowInput
from vpt.generation.generator import Generator
from vpt.generation.row_state import RowState


class UpstreamGenerator(Generator):
    """Goes on past `<|im_end|>`, forbids no token, never perceives, and gives each control token the embedding of the
    state just before it."""

    def _sample(self, rows: list[RowState], logits: Tensor) -> list[int]:
        return self.sampling.sample(logits, [row.rng for row in rows])

    def _next_input(self, row: RowState, token: int) -> RowInput:
        self._register_request(row, token)
        return RowInput([token])

    def _take_control_states(self, row: RowState, hidden: Tensor) -> None:
        control = self.vocabulary.actions[row.pending_action].control
        row.pending_states.extend(hidden)
        row.next_input = RowInput([control], states=hidden)
        row.append(control)
        if len(row.pending_states) == self.model.forward_config.projector_scale:
            row.pending_action = None
        self._check_length(row)
