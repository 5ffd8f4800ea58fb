"""Qwen2-VL: the base model of the paper."""

from transformers import Qwen2VLConfig

from vpt.models.families.base import Family


class Qwen2VL(Family):
    """Qwen2-VL, which is what `Family` describes by default."""

    name, title, config_class, upstream = "qwen2_vl", "Qwen2-VL", Qwen2VLConfig, True
    processor_class = "Qwen2VLProcessor"
