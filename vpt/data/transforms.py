"""`ImageTransform`, the contract of image transforms, and what they return, `ProcessedImage`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from vpt.data.videos import VideoClip
from vpt.perception.batch import Grid

Extent = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of an image; may lie beyond it


@dataclass(frozen=True)
class ProcessedImage:
    """One image or video as one view prepares it: `pixels` for the encoder, and how many `tokens` it will become.

    `seconds` is the time from one step of a video's grid to the next; an image has none.
    Where `vpt.data.feature_cache` knows what the encoder sees, there are `features` and no pixels; `key` is where it would look.
    """

    pixels: Tensor
    tokens: int
    grid: Grid | None = None
    seconds: float | None = None
    features: Tensor | None = None
    cache_key: str | None = None

    @property
    def nbytes(self) -> int:
        """What it takes to keep it."""
        return self.pixels.nbytes + (0 if self.features is None else self.features.nbytes)


class ImageTransform(ABC):
    """The image transform of an encoder. It holds no weights, so that data workers can carry it.

    `repr` says all that an image's pixels depend on. `name` is unique among the views of a model; encoders that share a
    view share what was seen through it.
    """

    name: str

    @abstractmethod
    def __call__(self, image: Image.Image) -> ProcessedImage:
        """An RGB image to what the encoder takes."""

    def to_token_count(self, image: Image.Image, tokens: int) -> ProcessedImage:
        """The same in about as many tokens as asked for; only Qwen's own tower sees images in any size."""
        raise NotImplementedError(f"the view {self.name!r} has a size of its own")

    def video(self, clip: VideoClip) -> ProcessedImage:
        """The same of a video; only Qwen's own tower takes one."""
        raise NotImplementedError(f"the view {self.name!r} takes images, no videos")

    def coverage(self, size: tuple[int, int]) -> Extent:
        """What the encoder's grid of tokens covers of an image of `size` (width, height): the whole of it."""
        return 0.0, 0.0, float(size[0]), float(size[1])


RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
              "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}  # fmt: skip
