"""Names that version 0.1 gave to keys, classes, metrics and results: its files have them, and users' fingers."""

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

# Former metric in metrics.jsonl -> present metric; what follows after another / stays
FORMER_METRICS = {
    "train/gradient_norm": "train/grad_norm",
    "train/learning_rate": "train/lr",
    "train/lost_steps": "train/nonfinite_steps",
    "perf/utilisation": "perf/mfu",
    "perf/share_waiting_for_data": "perf/data_wait_fraction",
    "perf/seconds_held_by_checkpoint": "perf/checkpoint_stall_seconds",
    "perf/memory_gib": "perf/peak_memory_gib",
    "masking/share_of_rows": "masking/fraction",
    "masking/share_of_acting_rows": "masking/fraction_of_action_rows",
}
FORMER_STATE = {"lost": "nonfinite_steps", "lost_in_a_row": "consecutive_nonfinite"}  # in state.json
_FORMER_COMPARISON = {"about": "description", "plain": "reference", "changed": "ablated"}
_FORMER_RESULTS = {"requests_mended": "requests_repaired", "cut_off": "truncated"}
_FORMER_PERCEPTION = {
    "acting_precision": "action_precision",
    "acting_recall": "action_recall",
    "same_kind": "action_accuracy",
    "perceived_tokens": "extra_visual_tokens",
    "seconds": "latency_seconds",
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


def present_metric(name: str) -> str:
    """The present name of a metric in `metrics.jsonl`; one that was never renamed stays."""
    for former, present in FORMER_METRICS.items():
        if name == former or name.startswith(f"{former}/"):
            return present + name.removeprefix(former)
    return name


def with_present_results(summary: Mapping[str, Any]) -> dict[str, Any]:
    """A `summary.json` that version 0.1 wrote, with the keys of this version."""
    renamed = _renamed(summary, _FORMER_RESULTS)
    if "controls" in renamed:
        renamed["ablations"] = {
            name: _renamed(item, _FORMER_COMPARISON) for name, item in renamed.pop("controls").items()
        }
    if "perception" in summary:
        renamed["perception"] = _renamed(summary["perception"], _FORMER_PERCEPTION)
    return renamed


def _renamed(values: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    return {names.get(key, key): value for key, value in values.items()}
