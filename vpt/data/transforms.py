"""`ImageTransform`, the contract of image transforms, and what they return, `ProcessedImage`."""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cached_property

import torch
from PIL import Image
from torch import Tensor

from vpt.data.videos import VideoClip
from vpt.perception.batch import Grid

Extent = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of an image; may lie beyond it
TokenRun = tuple[str, int]  # text, and the number of placeholder tokens between two vision markers after it


@dataclass(frozen=True)
class ProcessedImage:
    """One image or video as a transform returns it: `pixels` for the encoder, and how many `tokens` it will become.

    `seconds` is the time from one step of a video's grid to the next; an image has none. Where a video is written step
    by step, `captions` has the text before each. Out of the feature cache it has `features` and no pixels; `cache_key`
    is the name that its entry there has, or would have.
    """

    pixels: Tensor
    tokens: int
    grid: Grid | None = None
    seconds: float | None = None
    features: Tensor | None = None
    cache_key: str | None = None
    captions: tuple[str, ...] = ()
    frames: int = 1

    @property
    def runs(self) -> list[TokenRun]:
        """How it is written."""
        return [(caption, self.tokens // len(self.captions)) for caption in self.captions] or [("", self.tokens)]

    @property
    def nbytes(self) -> int:
        """Bytes of its tensors."""
        return self.pixels.nbytes + (0 if self.features is None else self.features.nbytes)


class ImageTransform(ABC):
    """The image transform of an encoder. It holds no weights, so that data workers can carry it.

    `repr` holds all that an image's pixels depend on. `name` is unique among the transforms of a model; encoders that
    share a transform share its features.
    """

    name: str

    @cached_property
    def description(self) -> str:
        """`repr`, which may take long, made once."""
        return repr(self)

    @abstractmethod
    def __call__(self, image: Image.Image) -> ProcessedImage:
        """An RGB image to what the encoder takes."""

    def to_token_count(self, image: Image.Image, tokens: int) -> ProcessedImage:
        """An image in about `tokens` tokens; only Qwen's own tower takes images of any size."""
        raise NotImplementedError(f"the transform {self.name!r} has a size of its own")

    def video(self, clip: VideoClip) -> ProcessedImage:
        """The frames of a video: by default images, one after the other."""
        looks = [self(frame) for frame in clip.frames]
        pixels = torch.stack([look.pixels for look in looks])
        return ProcessedImage(pixels, sum(look.tokens for look in looks), frames=len(looks))

    def coverage(self, size: tuple[int, int]) -> Extent:
        """The part of an image of `size` (width, height) that the encoder's grid of tokens covers: by default all."""
        return 0.0, 0.0, float(size[0]), float(size[1])


RESAMPLING = {"nearest": Image.Resampling.NEAREST, "bilinear": Image.Resampling.BILINEAR,
              "bicubic": Image.Resampling.BICUBIC, "lanczos": Image.Resampling.LANCZOS}  # fmt: skip
