"""Parse what a turn of the model asks for: `Request`s for a region or a re-encoding.

One rule reads regions, however they were said. From a region's start token to its end token, the next start token or
the end of the turn, the first two x and the first two y tokens are two opposite corners, in any order; whatever else
is said in between is skipped. Fewer than two of either, and the region is ignored. Cells cannot lie outside: the
vocabulary has none there, and a margin stops at the image's border.

A turn is shown one thing: its re-encoding, else the first of its regions that can be read. Once it has begun the one or
ended the other it cannot ask again. Whatever else it asked for is ignored, and so is all that it asked for where it was
cut off before `<|im_end|>`; a turn that is shown nothing is the answer.
"""

from collections.abc import Sequence
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
        said: the tokens that asked.
        region: the cells, or None where they cannot be read (or where the kind has none).
        mended: whether it was said otherwise than in training: a region as start, x, y, x, y, end from top left to
            bottom right, a re-encoding up to its end token.
    """

    kind: str
    token_ids: tuple[int, ...]
    region: Region | None = None
    repaired: bool = False


class PerceptionParser:
    """Reads the requests for perception in what a model has said."""

    def __init__(self, vocabulary: PerceptionVocabulary) -> None:
        """`starts` maps the token that begins a request to the kind of perception."""
        self.vocabulary = vocabulary
        self.starts = {one.start: name for name, one in vocabulary.actions.items()}
        if vocabulary.region_start is not None:
            self.starts[vocabulary.region_start] = REGION
        self._x = {token: i for i, token in enumerate(vocabulary.x)}
        self._y = {token: i for i, token in enumerate(vocabulary.y)}

    def completes(self, token: int) -> bool:
        """Whether a turn that says `token` has asked for what it will be shown."""
        return token == self.vocabulary.region_end or self.starts.get(token, REGION) != REGION

    def parse(self, said: Sequence[int]) -> list[Request]:
        """Everything that a turn asked for, in order: one request for each start token."""
        at = [i for i, token in enumerate(said) if token in self.starts]
        return [self._request(said[start:stop]) for start, stop in pairwise([*at, len(said)])]

    def select(self, requests: Sequence[Request]) -> Request | None:
        """The request that a finished turn is shown, if any."""
        encoded = [request for request in requests if request.kind != REGION]
        return encoded[-1] if encoded else next((request for request in requests if request.region), None)

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
