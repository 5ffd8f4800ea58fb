"""Names that version 0.1 gave to configuration keys and classes, as saved configurations have them."""

import re
from collections.abc import Mapping
from typing import Any

# Former key -> present key; `*` stands for a name that a user chooses
FORMER_KEYS = {
    "optim.clip": "optim.max_grad_norm",
    "optim.warmup": "optim.warmup_ratio",
    "optim.final_lr": "optim.min_lr_ratio",
    "training.keep": "training.keep_checkpoints",
    "training.best": "training.best_metric",
    "training.max_lost_steps": "training.max_nonfinite_steps",
    "training.final_questions": "training.final_eval_questions",
    "strategy.reshard": "strategy.reshard_after_forward",
    "data.on_too_long": "data.overflow",
    "data.prompted": "data.action_prompt",
    "data.plain_looks": "data.token_matched_images",
    "data.max_skipped": "data.max_skipped_fraction",
    "data.cache_mb": "data.image_cache_mb",
    "data.image.refuse_above": "data.image.max_file_pixels",
    "data.image.upright": "data.image.apply_exif_rotation",
    "model.perceived_positions": "model.reencoded_positions",
    "encoder.*.token": "encoder.*.token_prefix",
    "init_except": "init_exclude",
    "judge.key_from": "judge.api_key_env",
    "controls": "ablations",
    "describe": "assume",
}
FORMER_VALUES = {("data.overflow", "cut"): "truncate"}
FORMER_TARGETS = {
    "vpt.encoders.clip.TowerEncoder": "vpt.encoders.qwen_vit.QwenViTEncoder",
    "vpt.encoders.contrastive.ContrastiveEncoder": "vpt.encoders.clip_siglip.CLIPEncoder",
    "vpt.data.sources.records.RecordFile": "vpt.data.sources.record_files.RecordFile",
}


def present_name(key: str) -> str | None:
    """The present name of a former key, or of one below it; None for any other key."""
    for former, present in FORMER_KEYS.items():
        match = re.fullmatch(re.escape(former).replace(r"\*", "([^.]+)") + r"(\..+)?", key)
        if match:
            *names, rest = match.groups()
            return present.replace("*", names[0] if names else "*") + (rest or "")
    return None


def with_present_names(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A configuration that version 0.1 saved, as plain values, with the keys, values and classes of this version."""
    renamed = {}
    for key, value in config.items():
        path = present_name(f"{prefix}{key}") or f"{prefix}{key}"
        if isinstance(value, Mapping):
            value = with_present_names(value, f"{prefix}{key}.")
        elif isinstance(value, str):
            value = FORMER_TARGETS.get(value, value) if key == "target" else FORMER_VALUES.get((path, value), value)
        renamed[path.rpartition(".")[2]] = value
    return renamed
