"""DINOv2 as a re-encoder: 16x16 patch tokens at 224 px (paper section 3.3)."""

from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import Dinov2Config, Dinov2Model

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import LinearProjector
from vpt.encoders.transforms import IMAGENET_MEAN, IMAGENET_STD, SquareTransform


class DinoEncoder(ReEncoder):
    """`last_hidden_state` without its CLS, each patch one token."""

    @classmethod
    def build(
        cls, context: BuildContext, *, config: dict[str, Any], weights: str | None,
        side: int = 224, view: Literal["centre", "whole"] = "centre",
    ) -> "DinoEncoder":  # fmt: skip
        vision = Dinov2Model.from_pretrained(weights) if weights else Dinov2Model(Dinov2Config(**config))
        patches = (side // vision.config.patch_size) ** 2
        # The published processor resizes the short side to 256 and cuts 224 out of it.
        square = SquareTransform(context.name, side, patches, IMAGENET_MEAN, IMAGENET_STD, view, side * 256 // 224)
        projector = LinearProjector(
            vision.config.hidden_size, context.hidden_size, num_control_tokens=context.num_control_tokens
        )
        return cls(transform=square, vision=vision, projector=projector, pretrained=weights is not None)

    def unused_modules(self) -> list[nn.Module | nn.Parameter]:
        mask_token = self.vision.embeddings.mask_token  # belongs to its pretraining
        return [*super().unused_modules(), mask_token]

    def forward_features(self, pixels: Tensor) -> Tensor:
        return torch.flatten(self.vision(pixel_values=pixels).last_hidden_state[:, 1:], 0, 1)
