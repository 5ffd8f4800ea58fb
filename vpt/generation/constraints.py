"""Which tokens a row may sample: perception forced, forbidden, or limited in number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from vpt.generation.row_state import RowState
from vpt.perception.requests import FREE, NONE, REGION, PerceptionParser


class PerceptionConstraints:
    """Masks logits, as a logits processor of transformers does, by what an answer may perceive.

    `forbidden`, [k, vocabulary], holds the sets of tokens that rows have met so far and may not sample.
    """

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
        self._never, self._requests = [*controls, *foreign], [*parser.starts]
        self._numbers: dict[tuple[bool, tuple[int, ...]], int] = {}
        self.forbidden = torch.zeros(0, 0, dtype=torch.bool, device=device)

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
        for row in rows:
            row.constraint = self._number(row, logits.shape[-1])
        logits.masked_fill_(self.forbidden[[row.constraint for row in rows]], -torch.inf)

    def _number(self, row: RowState, vocabulary: int) -> int:
        """The number of the set that holds for the next token of a row."""
        spent = row.actions_left <= 0
        among = row.forced_prefix.pop(0) if row.forced_prefix else ()
        if (spent, among) not in self._numbers:
            self._numbers[spent, among] = len(self._numbers)
            forbidden = torch.full((1, vocabulary), bool(among), device=self.device)
            forbidden[:, list(among)] = False
            forbidden[:, self._never + self._requests * spent] = True
            self.forbidden = torch.cat([self.forbidden.view(-1, vocabulary), forbidden])
        return self._numbers[spent, among]
