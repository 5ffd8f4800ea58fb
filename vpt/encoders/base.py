"""`ReEncoder`, the contract of re-encoders: an image transform, a vision encoder, and a projector.

To add one: write a class with `build`, put its settings in `conf/encoder/NAME.yaml`. Nothing else names encoders.
"""

from abc import abstractmethod
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from vpt.data.transforms import ImageTransform
from vpt.encoders.projectors import ConditionalProjector


@dataclass(frozen=True)
class BuildContext:
    """The model that an encoder is built for; `num_control_tokens` are those of an action."""

    name: str
    hidden_size: int
    tower_transform: ImageTransform
    num_control_tokens: int = 1


class ReEncoder(nn.Module):
    """A vision encoder that encodes an image again, and its projector.

    Attributes:
        transform: the image transform.
        vision: the encoder, or None where the transform's features are Qwen's own.
        projector: brings features to the language model's width, conditioned on the control state.
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
            f"{type(self).__name__} uses the features of another encoder ({self.transform.name!r})"
        )
