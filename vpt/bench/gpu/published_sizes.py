"""The published sizes, and one that any machine can run to see that the program does."""

from dataclasses import dataclass
from typing import Any

import torch
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.bench.models import assemble
from vpt.bench.synthetic import VOCABULARY, SyntheticRow
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.vpt import VPTModel


@dataclass(frozen=True)
class BenchModel:
    """A model, and what it is measured on.

    Attributes:
        language, tower, dino: arguments of transformers' configurations.
        side: pixels of a side of the image that DINOv2 sees.
        talk: the row.
        new_tokens: of an answer.
    """

    language: dict[str, Any]
    tower: dict[str, Any]
    dino: dict[str, Any]
    side: int
    talk: SyntheticRow
    new_tokens: int


TOWER = {"depth": 32, "embed_dim": 1280, "num_heads": 16, "patch_size": 14}
DINO_LARGE = {"hidden_size": 1024, "num_hidden_layers": 24, "num_attention_heads": 16, "image_size": 518}
LOOK = SyntheticRow(image=(18, 19), question=100, perceives=True, answer=30)  # 512 x 532 pixels
MROPE = {"type": "mrope", "mrope_section": [16, 24, 24]}
QWEN2_VL_2B = BenchModel(
    {
        "vocab_size": 151_936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
        "num_attention_heads": 12, "num_key_value_heads": 2, "rope_scaling": MROPE, "tie_word_embeddings": True,
    },
    TOWER, DINO_LARGE, 224, LOOK, 128,
)  # fmt: skip
QWEN2_VL_7B = BenchModel(
    {
        "vocab_size": 152_064, "hidden_size": 3584, "intermediate_size": 18_944, "num_hidden_layers": 28,
        "num_attention_heads": 28, "num_key_value_heads": 4, "rope_scaling": MROPE, "tie_word_embeddings": False,
    },
    TOWER, DINO_LARGE, 224, LOOK, 128,
)  # fmt: skip
TINY = BenchModel(
    {
        "vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "tie_word_embeddings": True,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
    },
    {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 14},
    {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 56}, 56,
    SyntheticRow(image=(3, 4), question=8, perceives=True, answer=4), 4,
)  # fmt: skip


def build(sizes: BenchModel, device: torch.device, *, dtype: torch.dtype = torch.float32) -> VPTModel:
    """A model with random weights, made where it will live."""
    torch.manual_seed(0)
    vision = {**sizes.tower, "hidden_size": sizes.language["hidden_size"]}
    config = Qwen2VLConfig(
        **sizes.language, vision_config=vision, bos_token_id=0, eos_token_id=2, attn_implementation=SEGMENT_ATTENTION,
        image_token_id=VOCABULARY.image_pad, video_token_id=VOCABULARY.video_pad,
        vision_start_token_id=VOCABULARY.vision_start, vision_end_token_id=VOCABULARY.vision_end,
    )  # fmt: skip
    with torch.device(device):
        return assemble(Qwen2VLForConditionalGeneration(config), dino=sizes.dino, side=sizes.side).to(dtype)
