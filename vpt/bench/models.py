"""Models with random weights to measure with."""

from typing import Any

import torch
from PIL import Image
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.bench.synthetic import ENCODER, VOCABULARY
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.encoders.base import BuildContext
from vpt.encoders.dino import DinoEncoder
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.vpt import InnerForwardConfig, VPTModel
from vpt.perception.batch import VISION_TOWER

# About 50 M parameters, nearly all in the language model
LANGUAGE = {
    "vocab_size": 8192, "hidden_size": 640, "intermediate_size": 1792, "num_hidden_layers": 10,
    "num_attention_heads": 10, "num_key_value_heads": 2,
    "rope_scaling": {"type": "mrope", "mrope_section": [8, 12, 12]},
}  # fmt: skip
TOWER_SIZES = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8}
SMALL_DINO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224}
# DINOv2-base: beside 50 M parameters its look is a third of a step's work. At full size that is the place of SAM
# ViT-large (0.4 of a step of Qwen2-VL-2B); DINOv2-large is a fortieth there.
BASE_DINO = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
SIDE = 224  # of the image that DINOv2 takes: 16 x 16 patches


class NoTransform(ImageTransform):
    """Rows are made of tokens and random pixels; no image is prepared."""

    name = VISION_TOWER

    def __call__(self, image: Image.Image) -> ProcessedImage:
        raise NotImplementedError


def build_50m(*, vocabulary: int | None = None, dino: dict[str, Any] | None = None) -> VPTModel:
    """The model that figures are measured with; its towers are frozen.

    Args:
        vocabulary: another size of it; the embedding comes on top.
        dino: other sizes of the re-encoder, which is very small by default.
    """
    torch.manual_seed(0)
    sizes = {**LANGUAGE, "vocab_size": vocabulary or LANGUAGE["vocab_size"]}
    config = Qwen2VLConfig(
        **sizes, tie_word_embeddings=True, vision_config={**TOWER_SIZES, "hidden_size": sizes["hidden_size"]},
        bos_token_id=0, eos_token_id=2, attn_implementation=SEGMENT_ATTENTION,
    )  # fmt: skip
    return assemble(Qwen2VLForConditionalGeneration(config), dino=dino or SMALL_DINO, side=SIDE)


def assemble(qwen: Qwen2VLForConditionalGeneration, *, dino: dict[str, Any], side: int) -> VPTModel:
    """A language model and a DINOv2, its towers frozen as in training."""
    context = BuildContext(ENCODER, qwen.config.text_config.hidden_size, NoTransform())
    encoder = DinoEncoder.build(context, config=dino, weights=None, side=side)
    model = VPTModel(qwen, {ENCODER: encoder}, vocabulary=VOCABULARY, forward_config=InnerForwardConfig())
    for tower in (qwen.model.visual, encoder.vision):
        tower.requires_grad_(False)
    for part in encoder.unused_modules():
        part.requires_grad_(False)
    return model
