"""OpenAI's CLIP, SigLIP or SigLIP 2 of one image size, as a re-encoder: one token for each patch."""

from collections.abc import Collection, Mapping
from typing import Any, Literal

from torch import Tensor
from transformers import CLIPVisionConfig, CLIPVisionModel, SiglipVisionConfig, SiglipVisionModel

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import LinearProjector
from vpt.encoders.transforms import CLIP_MEAN, CLIP_STD, HALF, SquareTransform

# model type -> configuration, model, leading tokens that are no patches, mean, standard deviation
_FAMILIES: dict[str, tuple[Any, Any, int, tuple[float, ...], tuple[float, ...]]] = {
    "clip": (CLIPVisionConfig, CLIPVisionModel, 1, CLIP_MEAN, CLIP_STD),
    "siglip": (SiglipVisionConfig, SiglipVisionModel, 0, HALF, HALF),
}


class CLIPEncoder(ReEncoder):
    """`last_hidden_state` without CLIP's class token; SigLIP has none."""

    leading: int
    model_types = ("clip", "clip_vision_model", "siglip", "siglip_vision_model")

    @classmethod
    def types_of(cls, options: Mapping[str, Any]) -> Collection[str]:
        family = options.get("family") or "siglip"
        return [family, f"{family}_vision_model"]

    @classmethod
    def build(
        cls, context: BuildContext, *, config: dict[str, Any],
        family: Literal["clip", "siglip"] = "siglip", resample: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> "CLIPEncoder":  # fmt: skip
        config_class, model_class, leading, mean, std = _FAMILIES[family]
        vision = context.build_vision(model_class, config_class(**config))
        side, patch = vision.config.image_size, vision.config.patch_size
        encoder = cls(
            transform=SquareTransform(context.name, side, (side // patch) ** 2, mean=mean, std=std, resample=resample),
            vision=vision,
            projector=LinearProjector(
                vision.config.hidden_size, context.hidden_size, num_control_tokens=context.num_control_tokens
            ),
        )
        encoder.leading = leading
        return encoder

    def forward_features(self, pixels: Tensor) -> Tensor:
        return self.vision(pixel_values=pixels).last_hidden_state[:, self.leading :].flatten(0, 1)
