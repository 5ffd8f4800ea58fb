"""Names of tensors in the released checkpoints, and ours.

model.*, visual.*, lm_head.*                        qwen.model.language_model.*, qwen.model.visual.*, qwen.lm_head.*
detection_model.*, seg_model.*                      encoders.dino.vision.*, encoders.sam.vision.*
detection_projector.*, seg_projector.*, ...         encoders.*.projector.*
"""

# re-encoder -> how its tensors are spelt
RELEASED_TOKENS = {"dino": "detection", "sam": "seg", "clip": "clip"}

_PREFIXES = [
    ("visual.", "qwen.model.visual."),
    ("lm_head.", "qwen.lm_head."),
    *((f"{token}_projector.", f"encoders.{name}.projector.") for name, token in RELEASED_TOKENS.items()),
    ("detection_model.", "encoders.dino.vision."),
    ("seg_model.", "encoders.sam.vision.vision_encoder."),
    ("model.", "qwen.model.language_model."),
]

# DINOv2's attention was renamed in transformers after the release
_RENAMED = [
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
]


def our_name(released: str) -> str:
    """The name in `VPTModel.state_dict()` of a tensor in a released checkpoint. KeyError where there is none."""
    for prefix, ours in _PREFIXES:
        if released.startswith(prefix):
            name = ours + released.removeprefix(prefix)
            if prefix == "detection_model.":
                for old, new in _RENAMED:
                    name = name.replace(old, new)
            return name
    raise KeyError(f"tensor {released!r} belongs to no part of a released model")
