"""The format of upstream's (the authors') checkpoints: a flat `config.json`, and tensors by names of their own.

    model.*, visual.*, lm_head.*                        qwen.model.language_model.*, qwen.model.visual.*, qwen.lm_head.*
    detection_model.*, seg_model.*                      encoders.dino.vision.*, encoders.sam.vision.*
    detection_projector.*, seg_projector.*, ...         encoders.*.projector.*

`model.path=FOLDER` loads one; `vpt export format=upstream` writes one.
"""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt.checkpoint.architecture_files import check_architecture
from vpt.checkpoint.pretrained import Place, is_tied
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict
from vpt.config.schema import EncoderConfig, ModelConfig, TrainConfig
from vpt.config.weight_folder import UPSTREAM, read_settings
from vpt.errors import CheckpointError, ConfigError
from vpt.models.architecture import Architecture
from vpt.models.families import family_of
from vpt.models.vpt import VPTModel

SIZES = "re_encoder_sizes"  # our addition to config.json: upstream's code has its encoders' sizes built in
# re-encoder -> how its tensors are spelt
UPSTREAM_PREFIXES = {"dino": "detection", "sam": "seg", "clip": "clip"}
# re-encoder -> where its encoder's tensors are
_VISION = {"dino": "encoders.dino.vision.", "sam": "encoders.sam.vision.vision_encoder."}
_PREFIXES = [
    ("visual.", "qwen.model.visual."),
    ("lm_head.", "qwen.lm_head."),
    *((f"{token}_projector.", f"encoders.{name}.projector.") for name, token in UPSTREAM_PREFIXES.items()),
    *((f"{UPSTREAM_PREFIXES[name]}_model.", ours) for name, ours in _VISION.items()),
    ("model.", "qwen.model.language_model."),
]
# DINOv2's attention was renamed in transformers after the release
_RENAMED = [
    (".attention.attention.query.", ".attention.q_proj."),
    (".attention.attention.key.", ".attention.k_proj."),
    (".attention.attention.value.", ".attention.v_proj."),
    (".attention.output.dense.", ".attention.o_proj."),
]
_TEXT_KEYS = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
    "max_position_embeddings", "rms_norm_eps", "hidden_act", "attention_dropout", "initializer_range", "use_cache",
    "use_sliding_window", "sliding_window", "max_window_layers",
)  # fmt: skip
_ID_KEYS = ("image_token_id", "video_token_id", "vision_start_token_id", "vision_end_token_id")
_END_KEYS = ("bos_token_id", "eos_token_id", "pad_token_id")
_QWEN_KEYS = (
    *_TEXT_KEYS, *_ID_KEYS, *_END_KEYS, "rope_theta", "rope_scaling", "tie_word_embeddings", "vision_config",
)  # fmt: skip
_ACTION_KEYS = ("image_token", "action", "action_start")


def from_upstream_name(stored: str) -> str:
    """The name in `VPTModel.state_dict()` of a tensor in an upstream checkpoint. KeyError where there is none."""
    for prefix, ours in _PREFIXES:
        if stored.startswith(prefix):
            name = ours + stored.removeprefix(prefix)
            if ours == _VISION["dino"]:
                for old, new in _RENAMED:
                    name = name.replace(old, new)
            return name
    raise KeyError(f"tensor {stored!r} belongs to no part of an upstream model")


def to_upstream_name(ours: str) -> str:
    """The name in an upstream checkpoint of a tensor of ours. KeyError where the format has no place for it."""
    for prefix, start in _PREFIXES:
        if ours.startswith(start):
            name = prefix + ours.removeprefix(start)
            if start == _VISION["dino"]:
                for old, new in _RENAMED:
                    name = name.replace(new, old)
            return name
    raise KeyError(f"tensor {ours!r} has no place in an upstream checkpoint")


class UpstreamCheckpoint:
    """A folder in upstream's format."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        self.folder, self.config = folder, config
        self.tensors = LazyStateDict(folder)

    @classmethod
    def at(cls, path: str | Path | None) -> "UpstreamCheckpoint | None":
        """The checkpoint in a folder, or None where the folder holds something else."""
        config = read_settings(Path(path)) if path else {}
        return cls(Path(str(path)), config) if config.get("model_type") == UPSTREAM else None

    @property
    def encoders(self) -> list[str]:
        """Names of its re-encoders."""
        return list(self.config.get("vision_encoder_ls") or [])

    def sizes(self, encoders: Mapping[str, EncoderConfig]) -> Architecture:
        """Sizes of every part; those of encoders are the configuration's where the folder does not say."""
        qwen = {key: self.config[key] for key in _QWEN_KEYS if key in self.config}
        if self.config.get("tie_word_embeddings"):
            qwen["tie_word_embeddings"] = is_tied(self.tensors)
        stored = self.config.get(SIZES, {})
        sizes = Architecture(
            qwen, {name: stored.get(name, node.sizes[node.size].config) for name, node in encoders.items()}
        )
        check_architecture(sizes, where=self.folder / "config.json", tensors=len(self.tensors))
        return sizes

    def check(self, model: ModelConfig) -> None:
        """Raise ConfigError where the configuration's model is another one, or its ids are not the tokenizer's."""
        if not family_of(model.family).upstream:
            raise ConfigError(f"model.path={self.folder} is a Qwen2-VL, not a {model.family}; type model=qwen2_vl_2b")
        if self.encoders != model.vision_encoder_ls:
            raise ConfigError(
                f"model.path={self.folder} has the re-encoders {self.encoders}, the configuration "
                f"{model.vision_encoder_ls}; type encoder=[{','.join(self.encoders)}]"
            )
        theirs = {key: self.config.get(key) for key in model.token_ids}
        wrong = [
            f"{key} {theirs[key]} instead of {value}" for key, value in model.token_ids.items() if theirs[key] != value
        ]
        if wrong:
            raise ConfigError(f"the tokenizer in {self.folder} does not go with its config.json: {'; '.join(wrong)}")

    def check_size(self, model: VPTModel) -> None:
        """Raise CheckpointError where `config.json` asks for far more than the tensors hold: what it leaves out is
        transformers' default, which is 72 B parameters. `StoredWeights` are compared one by one.
        """
        wanted = sum(tensor.numel() for tensor in unique_state_dict(model).values())
        held = sum(map(math.prod, self.tensors.shapes.values()))
        if wanted > 2 * held:
            raise CheckpointError(
                f"{self.folder}/config.json describes a model of {wanted:,} numbers, the tensors are {held:,}; copy or "
                "download it again"
            )

    def places(self, *, tied: bool) -> dict[str, Place]:
        """Name in `VPTModel.state_dict()` -> place of every tensor, without a head that is `tied`.

        Raises CheckpointError for a tensor that belongs to no part.
        """
        stored = [name for name in self.tensors if not (tied and name == "lm_head.weight")]
        try:
            return {from_upstream_name(name): Place(name) for name in stored}
        except KeyError as error:
            raise CheckpointError(f"{self.folder}: {error.args[0]}") from None


def upstream_config(model: VPTModel, config: TrainConfig) -> dict[str, Any]:
    """The `config.json` of a model in upstream's format: flat keys, as transformers 4.45 wrote them."""
    qwen, sizes = model.qwen.config, Architecture.of(model)
    text, vision = qwen.text_config, model.qwen.config.vision_config.to_dict()
    rope = text.rope_parameters
    actions = {f"{token}_{key}_id": None for token in UPSTREAM_PREFIXES.values() for key in _ACTION_KEYS}
    return {
        "model_type": UPSTREAM,
        "architectures": ["Qwen2VLForConditionalGeneration"],
        **{key: getattr(text, key) for key in _TEXT_KEYS},
        "tie_word_embeddings": qwen.tie_word_embeddings,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": "mrope", "mrope_section": list(rope["mrope_section"])},
        "vision_config": {key: value for key, value in vision.items() if key not in ("dtype", "transformers_version")},
        **{key: getattr(qwen, key) for key in _ID_KEYS},
        "bos_token_id": model.vocabulary.end_of_text,
        "eos_token_id": model.vocabulary.im_end,
        "pad_token_id": model.vocabulary.end_of_text,
        "para_start_id": model.vocabulary.im_start,
        "para_end_id": model.vocabulary.im_end,
        "num_inner_forward_run": config.model.num_inner_forward_run,
        "projector_scale": config.model.projector_scale,
        "para_mask_id": config.masking.para_mask_id,
        "para_mask_ratio": config.masking.para_mask_ratio,
        "vision_encoder_ls": list(model.encoders),
        **actions,
        **config.model.token_ids,
        SIZES: sizes.encoders,
    }
