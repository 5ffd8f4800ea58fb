"""The one place where what a model perceives may be changed between its asking and its getting it.

Answering asks an `Intervention` at each point below; this one changes nothing. Controls are subclasses
(`vpt/evaluation/controls`): nothing in the model or the generator knows them.
"""

from collections.abc import Sequence

from PIL import Image
from torch import Tensor

from vpt.data.records import Record
from vpt.perception.regions import Region


class Intervention:
    """Leaves everything as it is.

    Attributes:
        perceives: False leaves the perceived turn empty: what asks for perception is said, nothing is seen.
    """

    perceives = True

    def on_batch(self, records: Sequence[Record]) -> None:
        """These are about to be answered together."""

    def states(self, states: Tensor, *, kind: str, record: Record) -> Tensor:
        """The control states of an action, [s, D]: they steer the projector and are its tokens' embeddings."""
        return states

    def image(self, image: Image.Image, *, record: Record) -> Image.Image:
        """The image, at full resolution, that is looked at again."""
        return image

    def region(self, region: Region, size: tuple[int, int], *, bins: int, record: Record) -> Region:
        """The cells that are looked at, of `bins` along a side, in an image of `size` (width, height)."""
        return region

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        """What one look through `source` gave, [T, D], before the control state steers it."""
        return tokens
