"""The sizes of a model's parts: what is needed to build it again without the folders it was made from."""

from dataclasses import dataclass
from typing import Any

from vpt.models.vpt import VPTModel


@dataclass(frozen=True)
class Architecture:
    """transformers' configurations, as dictionaries, of Qwen (`qwen`) and of each re-encoder that has its own."""

    qwen: dict[str, Any]
    encoders: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: VPTModel) -> "Architecture":
        """The configurations of a model's parts."""
        encoders = {name: vision.config.to_diff_dict() for name, vision in model.visions.items()}
        return cls(model.qwen.config.to_dict(), encoders)
