"""`ReEncoder`, the contract of re-encoders: an image transform, a vision encoder, and a projector.

To add one: write a class with `build`, put its settings in `conf/encoder/NAME.yaml`. Nothing else names encoders.
"""

from abc import abstractmethod
from collections.abc import Callable, Collection, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedConfig

from vpt.data.transforms import ImageTransform
from vpt.encoders.projectors import ConditionalProjector

Vision = TypeVar("Vision", bound=nn.Module)


@dataclass(frozen=True)
class BuildContext:
    """The model that an encoder is built for.

    Attributes:
        num_control_tokens: those of an action.
        stored: a folder holds the vision encoder's weights. They are read after it has been built.
    """

    name: str
    hidden_size: int
    tower_transform: ImageTransform
    num_control_tokens: int = 1
    stored: bool = False

    def build_vision(self, model: Callable[[PreTrainedConfig], Vision], config: PreTrainedConfig) -> Vision:
        """A vision encoder of transformers', with random weights; on the meta device where they are stored."""
        with torch.device("meta") if self.stored else nullcontext():
            return model(config)


class ReEncoder(nn.Module):
    """A vision encoder that encodes an image again, and its projector.

    Attributes:
        transform: the image transform.
        vision: the encoder, or None where the transform's features are Qwen's own.
        projector: brings features to the language model's width, conditioned on the control state.
        pretrained: whether `vision` comes with weights. What does is frozen by default, what does not is trained.
        model_types: transformers' model types of folders that `vision` may be read from; None where any will do.
    """

    pretrained = False
    model_types: ClassVar[tuple[str, ...] | None] = None
    transform: ImageTransform
    vision: Any
    projector: ConditionalProjector

    def __init__(self, *, transform: ImageTransform, vision: nn.Module | None, projector: ConditionalProjector) -> None:
        super().__init__()
        self.transform, self.vision, self.projector = transform, vision, projector

    @classmethod
    def types_of(cls, options: Mapping[str, Any]) -> Collection[str] | None:
        """Which of `model_types` these `options` of the YAML mean."""
        return cls.model_types

    @classmethod
    @abstractmethod
    def build(cls, context: BuildContext, *, config: dict[str, Any], **options: Any) -> "ReEncoder":
        """Make the encoder.

        Args:
            context: the model it is built for; its `build_vision` makes the vision encoder.
            config: arguments of the transformers configuration: of the folder of its weights, or of its size.
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
