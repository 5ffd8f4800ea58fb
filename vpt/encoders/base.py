"""What a re-encoder is: a view of the image, a vision encoder, a placeholder token, and a projector.

To add one: write a class with `build`, put its settings in `conf/encoder/NAME.yaml`. Nothing else names encoders.
"""

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

from PIL import Image
from torch import Tensor, nn

from vpt.data.videos import VideoClip
from vpt.projector import ConditionalProjector
from vpt.vision import Grid

Extent = tuple[float, float, float, float]  # x0, y0, x1, y1 in pixels of an image; may lie beyond it


@dataclass(frozen=True)
class ProcessedImage:
    """One image or video as one view prepares it: `pixels` for the encoder, and how many `tokens` it will become.

    `seconds` is the time from one step of a video's grid to the next; an image has none.
    Where `vpt.features` knows what the encoder sees, there are `features` and no pixels; `key` is where it would look.
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


@dataclass(frozen=True)
class BuildContext:
    """What an encoder may need of the model it is built for; `scale` is the number of control tokens of an action."""

    name: str
    hidden_size: int
    tower_transform: ImageTransform
    num_control_tokens: int = 1


class ReEncoder(nn.Module):
    """A vision encoder that looks again, and its projector.

    Attributes:
        view: the image transform.
        vision: the encoder, or None where the view's features are Qwen's own.
        projector: brings features to the language model's width, steered by the control state.
        pretrained: whether `vision` came with weights. What did is frozen by default, what did not is trained.
    """

    transform: ImageTransform
    vision: Any
    projector: ConditionalProjector

    def __init__(
        self, *, transform: ImageTransform, vision: nn.Module | None, projector: ConditionalProjector, pretrained: bool
    ) -> None:
        super().__init__()
        self.transform, self.vision, self.projector, self.pretrained = transform, vision, projector, pretrained

    @classmethod
    @abstractmethod
    def build(
        cls, context: BuildContext, *, config: dict[str, Any], weights: str | None, **options: Any
    ) -> "ReEncoder":
        """Make the encoder.

        Args:
            context: the model it is built for.
            config: arguments of the transformers configuration, for random weights.
            weights: hub name or folder of pretrained weights, or None.
            options: further keys of the YAML's `options`.
        """

    def unused_modules(self) -> list[nn.Module | nn.Parameter]:
        """Parts that nothing reads though checkpoints hold them; they are never trained."""
        return [*self.projector.unused_modules()]

    def forward_features(self, pixels: Tensor) -> Tensor:
        """[images, 3, H, W] -> [images * positions, feature_dim], image after image."""
        raise NotImplementedError(
            f"{type(self).__name__} looks through the view {self.transform.name!r} of another encoder"
        )
