"""SAM's image encoder as a re-encoder: 64x64 positions, 16x16 tokens (paper section 3.3)."""

from typing import Any

from einops import rearrange
from torch import Tensor
from transformers import SamVisionConfig, SamVisionModel

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import ConvProjector
from vpt.encoders.transforms import ResizeLongestSide


class SamEncoder(ReEncoder):
    """The neck's output, 256 channels, through a 4x4 convolution of stride 4."""

    model_types = ("sam", "sam_vision_model")

    @classmethod
    def build(cls, context: BuildContext, *, config: dict[str, Any]) -> "SamEncoder":
        vision = context.build_vision(SamVisionModel, SamVisionConfig(**config))
        side = vision.config.image_size // vision.config.patch_size
        projector = ConvProjector(
            vision.config.output_channels, context.hidden_size, side=side, num_control_tokens=context.num_control_tokens
        )
        transform = ResizeLongestSide(context.name, vision.config.image_size, (side // projector.patch) ** 2)
        return cls(transform=transform, vision=vision, projector=projector)

    def forward_features(self, pixels: Tensor) -> Tensor:
        return rearrange(self.vision(pixel_values=pixels).last_hidden_state, "n c h w -> (n h w) c")
