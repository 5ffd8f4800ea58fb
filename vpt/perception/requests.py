"""Parse what a turn of the model asks for: `Request`s for a region or a re-encoding.

One rule reads regions, however they were said. From a region's start token to its end token, the next start token or
the end of the turn, the first two x and the first two y tokens are two opposite corners, in any order; whatever else
is said in between is skipped. Fewer than two of either, and the region is ignored. Cells cannot lie outside: the
vocabulary has none there, and a margin stops at the image's border.

Where regions are text (`model.region_format: text`), four numbers inside the grid, `[x0, y0, x1, y1]`, are one.

A turn is shown all that it requested, in order: its re-encodings, and its regions that can be read. All that it
requested is ignored where it was cut off before `<|im_end|>`; a turn that is shown nothing is the answer.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from vpt.perception.regions import Region
from vpt.perception.tokens import PerceptionVocabulary

REGION = "region"
FREE, NONE = "free", "none"


@dataclass(frozen=True)
class Request:
    """One request for perception in a turn.

    Attributes:
        kind: `region` or a re-encoder.
        token_ids: the tokens of the request; none where it is text.
        text: the request where it is text.
        region: the cells, or None where they cannot be read (or where the kind has none).
        repaired: whether it was said otherwise than in training: a region as start, x, y, x, y, end from top left to
            bottom right, a re-encoding up to its end token.
    """

    kind: str
    token_ids: tuple[int, ...]
    region: Region | None = None
    repaired: bool = False
    text: str = ""

    @property
    def readable(self) -> bool:
        """Whether the request names something that can be shown."""
        return self.kind != REGION or self.region is not None


class PerceptionParser:
    """Reads the requests for perception in what a model has said."""

    def __init__(self, vocabulary: PerceptionVocabulary, decode: Callable[[list[int]], str] | None = None) -> None:
        """`starts` maps the token that begins a request to the kind of perception; `decode`, token ids to text, is
        needed for models whose regions are text."""
        self.vocabulary, self._decode = vocabulary, decode
        self.starts = {one.start: name for name, one in vocabulary.actions.items()}
        if vocabulary.region_start is not None:
            self.starts[vocabulary.region_start] = REGION
        self._x = {token: i for i, token in enumerate(vocabulary.x)}
        self._y = {token: i for i, token in enumerate(vocabulary.y)}

    def parse(self, said: Sequence[int]) -> list[Request]:
        """Everything that a turn requested, in order: one request for each start token, and for each region in text."""
        at = [i for i, token in enumerate(said) if token in self.starts]
        requests = self._in_text(said[: at[0] if at else len(said)])
        for start, stop in pairwise([*at, len(said)]):
            requests.append(self._request(said[start:stop]))
            requests.extend(self._in_text(said[start + len(requests[-1].token_ids) : stop]))
        return requests

    def _in_text(self, said: Sequence[int]) -> list[Request]:
        if not self.vocabulary.text_bins or self._decode is None:
            return []
        found = Region.find(self._decode([token for token in said if token != self.vocabulary.im_end]), numbers=True)
        return [
            Request(REGION, (), region, repaired=match[0] != region.to_numbers(), text=match[0])
            for match, region in found
            if max(region.x1, region.y1) < self.vocabulary.text_bins
        ]

    def _request(self, said: Sequence[int]) -> Request:
        kind = self.starts[said[0]]
        if kind != REGION:
            end = self.vocabulary.actions[kind].end
            return Request(kind, _up_to(end, said), repaired=end not in said)
        v = self.vocabulary
        assert v.region_end is not None
        said = _up_to(v.region_end, said)
        x = [self._x[token] for token in said if token in self._x][:2]
        y = [self._y[token] for token in said if token in self._y][:2]
        if len(x) < 2 or len(y) < 2:
            return Request(kind, said)
        region = Region(min(x), min(y), max(x), max(y))
        proper = (v.region_start, v.x[region.x0], v.y[region.y0], v.x[region.x1], v.y[region.y1], v.region_end)
        return Request(kind, said, region, repaired=said != proper)


def _up_to(end: int, said: Sequence[int]) -> tuple[int, ...]:
    return tuple(said[: said.index(end) + 1] if end in said else said)
