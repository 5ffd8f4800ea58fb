"""Which tokens a row may sample: perception forced, forbidden, or limited in number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.generation.row_state import RowState
from vpt.perception.requests import FREE, NONE, REGION, PerceptionParser


class PerceptionConstraints:
    """Masks logits, as a logits processor of transformers does, by what an answer may perceive."""

    def __init__(self, parser: PerceptionParser, action: str = FREE, *, device: torch.device) -> None:
        """Args:
        parser: of the model's vocabulary.
        action: `free`; `none` forbids perception; a kind makes answers begin with it and forbids the others. All tokens
            of what is forbidden are, so that none of them gets into an answer.
        device: of the logits.
        """
        self.parser, self.action, self.device = parser, action, device
        controls = [one.control for one in parser.vocabulary.actions.values()]
        foreign = [token for kind, own in self._tokens().items() if action not in (FREE, kind) for token in own]
        self._never, self._requests = self._indices([*controls, *foreign]), self._indices([*parser.starts])

    def _tokens(self) -> dict[str, list[int]]:
        """Kind of perception -> the tokens that request it, without control tokens."""
        v = self.parser.vocabulary
        tokens = {name: [one.start, one.end] for name, one in v.actions.items()}
        if v.region_start is not None and v.region_end is not None:
            tokens[REGION] = [v.region_start, *v.x, *v.y, v.region_end]
        return tokens

    def forced_prefix(self) -> list[tuple[int, ...]]:
        """Token sets that an answer must begin with, one set for each token; control tokens come by themselves."""
        v = self.parser.vocabulary
        if self.action in (FREE, NONE):
            return []
        if self.action == REGION:
            assert v.region_start is not None
            assert v.region_end is not None
            return [(v.region_start,), v.x, v.y, v.x, v.y, (v.region_end,), (v.im_end,)]
        action = v.actions[self.action]
        return [(action.start,), (action.end,), (v.im_end,)]

    def mask_logits(self, logits: Tensor, rows: Sequence[RowState]) -> None:
        """Write -inf into [n, vocabulary] for the tokens that each row may not sample now.

        Control tokens are never sampled (they are forced), nor are the tokens of a forbidden kind. A row that has no
        actions left cannot request more; one with a forced prefix samples from its next set.
        """
        logits[:, self._never] = -torch.inf
        spent = [row for row, state in enumerate(rows) if state.actions_left <= 0]
        if spent:
            logits[self._indices(spent)[:, None], self._requests] = -torch.inf
        for row, state in enumerate(rows):
            if state.forced_prefix:
                among = self._indices(state.forced_prefix.pop(0))
                kept = logits[row, among]
                logits[row] = -torch.inf
                logits[row, among] = kept

    def _indices(self, values: Sequence[int]) -> Tensor:
        return torch.tensor(values, dtype=torch.long, device=self.device)
