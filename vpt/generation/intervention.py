"""Hooks that change what a model perceives, between its request and what it is shown.

Answering asks an `Intervention` at each point below; this one changes nothing. Ablations are subclasses
(`vpt/evaluation/ablations`): nothing in the model or the generator knows them.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vpt.data.records import Record
from vpt.perception.regions import Region


class Intervention:
    """Hooks by which ablations change perception; this one changes nothing.

    Attributes:
        may_request: False forbids requests for perception, forced ones too.
        perceives: False shows an empty turn: perception is requested, nothing is seen.
    """

    may_request = True
    perceives = True

    def on_batch(self, records: Sequence[Record]) -> None:
        """Called with the records that are about to be answered together."""

    def states(self, states: Tensor, *, kind: str, record: Record) -> Tensor:
        """The control states of an action, [s, D]: they condition the projector and are its tokens' embeddings."""
        return states

    def image(self, image: Image.Image, *, record: Record) -> Image.Image:
        """The image, at full resolution, that is shown again."""
        return image

    def region(self, region: Region, size: tuple[int, int], *, bins: int, record: Record) -> Region:
        """The cells that are shown, of `bins` along a side, in an image of `size` (width, height)."""
        return region

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        """Tokens of one image through `source`, [T, D], before the control state conditions them."""
        return tokens
