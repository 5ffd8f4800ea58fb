"""A configuration's model on the meta device: every module and size, no weights, no network."""

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vpt.checkpoint.upstream import UpstreamCheckpoint, read_config
from vpt.config.schema import EncoderConfig, ModelConfig, TrainConfig
from vpt.errors import ConfigError
from vpt.models.architecture import Architecture
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.qwen import from_pretrained_or_hub
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.training.optimizer import set_trainable


def build_on_meta(config: TrainConfig) -> ModelBundle:
    """The parts of a configuration without weights, trained and frozen as a run would have them.

    Sizes are those of a local folder's `config.json`, or those in the configuration where `path` is a hub's name. Ids
    come from the tiny tokenizer: they count for nothing here.

    Raises:
        ConfigError: where a folder holds another kind of model.
    """
    settings = replace(
        config, model=replace(config.model, token_ids={}), generation=replace(config.generation, stop=[])
    )
    with torch.device("meta"):
        parts = build_bundle(settings, tiny_tokenizer(), sizes=_sizes(config))
    set_trainable(parts.model, config.optim, tower_pretrained=config.model.path is not None)
    return parts


def is_folder(path: str | None) -> bool:
    """Whether a path is a folder of this machine rather than a name on a hub."""
    return path is not None and Path(path).is_dir()


def _sizes(config: TrainConfig) -> Architecture:
    released = UpstreamCheckpoint.at(config.model.path)
    if released:
        return released.sizes(config.encoder)
    return Architecture(
        _qwen(config.model), {name: _encoder(name, encoder) for name, encoder in config.encoder.items()}
    )


def _qwen(config: ModelConfig) -> dict[str, Any]:
    if not is_folder(config.path):
        return config.config | {"bos_token_id": None, "eos_token_id": None}
    sizes = read_config(config.path)
    if sizes.get("model_type") != config.family:
        raise ConfigError(
            f"model.path={config.path} holds {sizes.get('model_type', 'no config.json')}, model.family is "
            f"{config.family}; choose the model group that fits (model=qwen2_vl_2b, model=qwen2_5_vl_3b, ...)"
        )
    return sizes


def _encoder(name: str, encoder: EncoderConfig) -> dict[str, Any]:
    size = encoder.sizes[encoder.size]
    path = encoder.path or size.weights
    if not is_folder(path):
        return size.config
    stored = from_pretrained_or_hub(
        path, f"encoder.{name}.path", partial(AutoConfig.from_pretrained, local_files_only=True)
    )
    return getattr(stored, "vision_config", stored).to_diff_dict()
