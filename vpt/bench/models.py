"""Models with random weights to measure with, and the row that each is measured on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from vpt.checkpoint.initialize import initialize, materialize
from vpt.config.schema import EncoderConfig, EncoderSize, LoraConfig, ModelConfig, OptimConfig, TrainConfig
from vpt.data.synthetic import SyntheticRow
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.training.optimizer import set_trainable

ENCODER = "dino"
ROW = SyntheticRow(encoder=ENCODER)  # 64 image, 40 question, 256 re-encoded, 30 answer tokens
CONF = Path(__file__).resolve().parents[2] / "conf"


@dataclass(frozen=True)
class BenchModel:
    """A Qwen2-VL with DINOv2.

    Attributes:
        qwen, dino: arguments of transformers' configurations.
        side: pixels of a side of the image that DINOv2 takes.
        row: of a batch.
        new_tokens: of an answer.
    """

    qwen: dict[str, Any]
    dino: dict[str, Any]
    side: int = 224
    row: SyntheticRow = ROW
    new_tokens: int = 24

    @classmethod
    def published(cls, name: str) -> "BenchModel":
        """The sizes of a configuration in conf/model, with DINOv2-large, on an image of 512 x 532 pixels."""
        sizes = yaml.safe_load((CONF / "model" / f"{name}.yaml").read_text())["model"]["config"]
        dino = yaml.safe_load((CONF / "encoder" / "dino.yaml").read_text())["sizes"]["full"]["config"]
        return cls(sizes, dino, row=SyntheticRow((504, 532), question=80, encoder=ENCODER), new_tokens=128)

    def build(
        self, device: torch.device | str = "cpu", *, dtype: str = "float32", lora: LoraConfig | None = None
    ) -> ModelBundle:
        """The model, made where it will live, its towers frozen as in training."""
        dino = EncoderSize(config=self.dino, options={"side": self.side})
        encoder = EncoderConfig("vpt.encoders.dino.DinoEncoder", "detection", sizes={"full": dino})
        model = ModelConfig(config=self.qwen, dtype=dtype, lora=lora or LoraConfig())
        bundle = build_bundle(TrainConfig("bench", model=model, encoder={ENCODER: encoder}), tiny_tokenizer())
        materialize(bundle.model, device)
        torch.manual_seed(0)
        with torch.device(device):
            initialize(bundle, [])
        frozen = OptimConfig(freeze=["qwen.model.visual.*", "encoders.*.vision.*"])
        set_trainable(bundle.model, frozen, tower_pretrained=True)
        return bundle


def qwen_sizes(width: int, layers: int, heads: int, **sizes: Any) -> dict[str, Any]:
    """Sizes of a Qwen2-VL with a vision tower of one small layer."""
    pairs = width // heads // 2  # rotary frequencies of a head
    section = [pairs // 4, pairs * 3 // 8, pairs - pairs // 4 - pairs * 3 // 8]
    tower = {"depth": 1, "embed_dim": 32, "num_heads": 2, "patch_size": 8, "hidden_size": width}
    return {
        "vocab_size": 8192, "hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": 2, "rope_scaling": {"type": "mrope", "mrope_section": section},
        "tie_word_embeddings": True, "vision_config": tower, **sizes,
    }  # fmt: skip


SMALL_DINO = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 224}
# DINOv2-base: beside 50 M parameters it is a third of a step's work. At full size that is the place of SAM ViT-large
# (0.4 of a step of Qwen2-VL-2B); DINOv2-large is a fortieth there.
BASE_DINO = {"hidden_size": 768, "num_hidden_layers": 12, "num_attention_heads": 12, "image_size": 224}
# About 50 M parameters, nearly all in the language model
SMALL = BenchModel(qwen_sizes(640, 10, 10, intermediate_size=1792), SMALL_DINO)
# For any machine, to see that a program runs
TINY_QWEN = qwen_sizes(64, 2, 2, intermediate_size=128, vocab_size=576)
TINY = BenchModel(TINY_QWEN, SMALL_DINO, 56, SyntheticRow((64, 64), 8, encoder=ENCODER, answer=4), 4)
