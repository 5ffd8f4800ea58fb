"""DINOv2, with or without registers, and DINOv3 as re-encoders: one token for each patch (paper section 3.3)."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import (
    Dinov2Config,
    Dinov2Model,
    Dinov2WithRegistersConfig,
    Dinov2WithRegistersModel,
    DINOv3ViTConfig,
    DINOv3ViTModel,
)

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import LinearProjector
from vpt.encoders.transforms import IMAGENET_MEAN, IMAGENET_STD, SquareTransform

_FAMILIES: dict[str, tuple[Any, Any]] = {  # model type -> configuration, model
    "dinov2": (Dinov2Config, Dinov2Model),
    "dinov2_with_registers": (Dinov2WithRegistersConfig, Dinov2WithRegistersModel),
    "dinov3_vit": (DINOv3ViTConfig, DINOv3ViTModel),
}
_AUGMENTATIONS = ("pos_embed_shift", "pos_embed_jitter", "pos_embed_rescale")  # of DINOv3's positions, in training


class DinoEncoder(ReEncoder):
    """`last_hidden_state` without its class and register tokens."""

    model_types = tuple(_FAMILIES)

    @classmethod
    def types_of(cls, options: Mapping[str, Any]) -> Collection[str]:
        return [options.get("family") or "dinov2"]

    @classmethod
    def build(
        cls, context: BuildContext, *, config: dict[str, Any],
        family: Literal["dinov2", "dinov2_with_registers", "dinov3_vit"] = "dinov2",
        side: int = 224, view: Literal["centre", "whole"] = "centre",
        resample: Literal["bicubic", "bilinear"] = "bicubic", resize_floats: bool = False,
    ) -> "DinoEncoder":  # fmt: skip
        if resize_floats and view == "centre":
            raise ValueError("options.resize_floats=true resizes the whole image; type view=whole with it")
        config_class, model_class = _FAMILIES[family]
        vision = context.build_vision(model_class, config_class(**config))
        for name in _AUGMENTATIONS:
            if hasattr(vision.config, name):  # an image's features are always the same
                setattr(vision.config, name, None)
        patches = (side // vision.config.patch_size) ** 2
        # DINOv2's published processor resizes the short side to 256 and cuts 224 out of it.
        square = SquareTransform(
            context.name, side, patches, mean=IMAGENET_MEAN, std=IMAGENET_STD, view=view, resize_to=side * 256 // 224,
            resample=resample, resize_floats=resize_floats,
        )  # fmt: skip
        projector = LinearProjector(
            vision.config.hidden_size, context.hidden_size, num_control_tokens=context.num_control_tokens
        )
        return cls(transform=square, vision=vision, projector=projector)

    def unused_modules(self) -> list[nn.Module | nn.Parameter]:
        mask_token = self.vision.embeddings.mask_token  # belongs to its pretraining
        return [*super().unused_modules(), mask_token]

    def forward_features(self, pixels: Tensor) -> Tensor:
        leading = 1 + getattr(self.vision.config, "num_register_tokens", 0)
        return torch.flatten(self.vision(pixel_values=pixels).last_hidden_state[:, leading:], 0, 1)
