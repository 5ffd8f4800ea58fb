"""`clip`: re-encoding through Qwen's own visual tower (the paper's name for it, kept; it is not OpenAI's CLIP).

For OpenAI's CLIP or SigLIP see `vpt/encoders/clip_siglip.py`.
"""

from typing import Any

from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.projectors import Deep, IdentityProjector


class QwenViTEncoder(ReEncoder):
    """Shares the tower's transform, and so its features: an image is encoded once for both."""

    pretrained, model_types = True, ()

    @classmethod
    def build(cls, context: BuildContext, *, config: dict[str, Any], deep: Deep = "none") -> "QwenViTEncoder":
        if config:
            raise ValueError("it is Qwen's own tower and takes no sizes of its own")
        projector = IdentityProjector(context.hidden_size, num_control_tokens=context.num_control_tokens, deep=deep)
        return cls(transform=context.tower_transform, vision=None, projector=projector)
