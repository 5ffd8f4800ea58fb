"""SAM 2's image encoder (Hiera with a feature pyramid) as a re-encoder: 16x16 tokens of one level."""

from typing import Any

from einops import rearrange
from torch import Tensor, nn
from transformers import Sam2VisionConfig, Sam2VisionModel

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import ConvProjector
from vpt.encoders.transforms import IMAGENET_MEAN, IMAGENET_STD, SquareTransform


class Sam2Encoder(ReEncoder):
    """Level 0 of the pyramid has 256x256 positions, 1 has 128x128, 2 has 64x64; a convolution makes tokens of them."""

    model_types = ("sam2", "sam2_video", "sam2_vision_model")
    level: int

    @classmethod
    def build(cls, context: BuildContext, *, config: dict[str, Any], level: int = 2, grid: int = 16) -> "Sam2Encoder":
        """`grid`: rows and columns of tokens."""
        settings = Sam2VisionConfig(**config)
        sides = [size[0] for size in settings.backbone_feature_sizes]
        if not 0 <= level < len(sides) or sides[level] % grid:
            raise ValueError(f"options.level={level} does not make {grid}x{grid} tokens; levels have sides {sides}")
        vision = context.build_vision(Sam2VisionModel, settings)
        projector = ConvProjector(
            settings.fpn_hidden_size, context.hidden_size, side=sides[level], patch=sides[level] // grid,
            num_control_tokens=context.num_control_tokens,
        )  # fmt: skip
        side = settings.backbone_config.image_size[0]
        transform = SquareTransform(
            context.name, side, grid * grid, mean=IMAGENET_MEAN, std=IMAGENET_STD, resample="bilinear"
        )
        encoder = cls(transform=transform, vision=vision, projector=projector)
        encoder.level = level
        return encoder

    def unused_modules(self) -> list[nn.Module | nn.Parameter]:
        """What other levels alone are made of: a level has its own stage, and the coarser one that is added to it."""
        neck, backbone = self.vision.neck, self.vision.backbone
        coarsest = len(neck.convs) - 1
        top = self.level
        while top in neck.fpn_top_down_levels and top < coarsest:
            top += 1
        convs = [neck.convs[coarsest - i] for i in range(coarsest + 1) if not self.level <= i <= top]
        return [*super().unused_modules(), *convs, *backbone.blocks[backbone.stage_ends[top] + 1 :]]

    def forward_features(self, pixels: Tensor) -> Tensor:
        maps = self.vision(pixel_values=pixels).fpn_hidden_states[self.level]
        return rearrange(maps, "n c h w -> (n h w) c")
