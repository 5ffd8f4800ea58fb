"""Checks of a configuration across fields; `vpt.config.resolve` checks each field alone."""

import re
from collections.abc import Mapping
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from vpt.config.resolve import check_values, explain_unknown
from vpt.config.schema import EncoderConfig, GenerationConfig, SourceConfig, TrainConfig
from vpt.config.targets import RE_ENCODER, SOURCE, check_arguments, locate
from vpt.config.validate_rl import check_rl
from vpt.config.weight_folder import UPSTREAM, check_weight_folder
from vpt.errors import ConfigError, did_you_mean, first_line

Settings = TypeVar("Settings")


def validate(config: TrainConfig) -> None:
    """Raise ConfigError for fields that do not fit each other or this machine; loads no weights and no data."""
    encoders = list(config.encoder)
    if config.model.vision_encoder_ls != encoders:
        raise ConfigError(
            f"model.vision_encoder_ls={config.model.vision_encoder_ls} but the re-encoders configured are {encoders}; "
            f"choose them with encoder=[{','.join(config.model.vision_encoder_ls)}]"
        )
    kinds = kinds_of(config)
    for kind in config.data.actions:
        if kind not in kinds and config.data.actions[kind] > 0:
            raise ConfigError(
                f"data.actions.{kind} asks for a kind of perception that this model lacks; it has {', '.join(kinds)}"
                f"{did_you_mean(kind, kinds)}"
            )
    _check_numbers(config)
    _check_action(config.generation, config)
    check_rl(config)
    for name, encoder in config.encoder.items():
        _check_encoder(name, encoder)
    _check_token_prefixes(config.encoder)
    for split in ("train", "test"):
        for name, source in getattr(config.data, split).items():
            check_arguments(f"data.{split}.{name}", source, SOURCE, given=("context",))
    if config.data.token_matched_images and config.data.perception:
        raise ConfigError(
            "data.token_matched_images=true takes the place of perception; type data.perception=false with it"
        )
    if config.data.root is not None and not _is_folder(config.data.root):
        raise ConfigError(f"data.root={config.data.root} is not a folder; type data.root=FOLDER")
    if config.model.path is None and not config.model.config:
        raise ConfigError("model.path is not set and model.config has no sizes; type model.path=FOLDER or model=tiny")
    if config.model.lora.rank and find_spec("peft") is None:
        raise ConfigError(f"model.lora.rank={config.model.lora.rank} needs the package peft; type: pip install peft")
    if config.strategy.cpu_offload and config.strategy.kind not in ("fsdp", "hybrid"):
        kind = config.strategy.kind
        raise ConfigError(f"strategy.cpu_offload is for shards, not for strategy={kind}; type strategy=fsdp")
    _check_bits(config)
    family = config.model.family
    check_weight_folder(config.model.path, "model.path", [family, UPSTREAM] if family == "qwen2_vl" else [family])


def whole_model_keys(config: TrainConfig) -> list[str]:
    """Settings of a run that need bitsandbytes, and whole models: it knows no shards."""
    asked = {
        "optim.name=adamw_8bit": config.optim.name == "adamw_8bit",
        "model.load_in_4bit=true": config.model.load_in_4bit,
    }
    return [key for key, wanted in asked.items() if wanted]


def _check_bits(config: TrainConfig) -> None:
    """What is stored in fewer bits."""
    model = config.model
    if model.frozen_dtype is not None and config.training.precision != "bf16":
        raise ConfigError(
            f"model.frozen_dtype={model.frozen_dtype} is for products in bfloat16; type training.precision=bf16 with it"
        )
    if model.load_in_4bit and not model.lora.rank:
        raise ConfigError("model.load_in_4bit=true cannot train the base itself; type model.lora.rank=16 with it")
    if model.load_in_4bit and (model.path is None or config.training.save_frozen_weights):
        raise ConfigError(
            "model.load_in_4bit=true is for a base that checkpoints name, not hold; type model.path=FOLDER and "
            "training.save_frozen_weights=false"
        )
    if model.load_in_4bit and config.rl.algorithm != "none":
        raise ConfigError("model.load_in_4bit=true has no reward learning; type model.load_in_4bit=false")
    for key in whole_model_keys(config):
        if find_spec("bitsandbytes") is None:
            raise ConfigError(f"{key} needs the package bitsandbytes; type: pip install 'vpt[quant]'")


def _check_numbers(config: TrainConfig) -> None:
    """Numbers that only make sense together."""
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas={config.optim.betas} must be two numbers, each from 0 to below 1")
    for name, limits in (("image", config.data.image), ("video", config.data.video)):
        if (limits.min_pixels or 0) > (limits.max_pixels or limits.min_pixels or 0):
            raise ConfigError(
                f"data.{name}.min_pixels={limits.min_pixels} is above data.{name}.max_pixels={limits.max_pixels}"
            )


def kinds_of(config: TrainConfig) -> list[str]:
    """Kinds of action of a model: none, selecting a region where it can, and re-encoding with each re-encoder."""
    return ["none", *(["region"] if config.model.region_bins else []), *config.encoder]


def overlaid(settings: Settings, chosen: Mapping[str, Any], prefix: str) -> Settings:
    """Settings of a trained model, overlaid with those that are `chosen` now; null chooses nothing.

    Raises ConfigError, with keys that begin with `prefix`, for unknown ones, wrong types and values out of range.
    """
    known = [f"{prefix}{item.name}" for item in fields(settings)]  # type: ignore[arg-type]
    for key in chosen:
        if f"{prefix}{key}" not in known:
            raise ConfigError(explain_unknown(f"{prefix}{key}", known))
    given = {key: value for key, value in chosen.items() if value is not None}
    try:
        merged: Any = OmegaConf.to_object(OmegaConf.merge(OmegaConf.structured(settings), given))
    except OmegaConfBaseException as error:
        raise ConfigError(f"{prefix}{error.full_key}: {first_line(error)}") from None
    check_values(merged, prefix)
    return merged


def generation_settings(trained: TrainConfig, chosen: Mapping[str, Any]) -> GenerationConfig:
    """Generation settings of a trained model with those that are chosen now. Raises ConfigError, also for an action
    that the model lacks.
    """
    merged = overlaid(trained.generation, chosen, "generation.")
    _check_action(merged, trained)
    return merged


def chosen_test_sets(trained: TrainConfig, chosen: Mapping[str, Any]) -> dict[str, SourceConfig]:
    """The test sets that are chosen now, each over the trained settings of that name; all trained ones where none is.

    Raises ConfigError for keys, values and options that do not exist.
    """
    sources = {}
    for name, given in chosen.items():
        if not isinstance(given, Mapping):
            raise ConfigError(f"data.test.{name}={given} is no test set; type data.test.{name}.options.path=FILE")
        source = overlaid(trained.data.test.get(name, SourceConfig()), given, f"data.test.{name}.")
        check_arguments(f"data.test.{name}", source, SOURCE, given=("context",))
        sources[name] = source
    return sources or trained.data.test


def _check_action(generation: GenerationConfig, config: TrainConfig) -> None:
    action, actions = generation.action, ["free", *kinds_of(config)]
    if action not in actions:
        raise ConfigError(
            f"generation.action={action} is nothing that this model can do; it knows {', '.join(actions)}"
            f"{did_you_mean(action, actions)}"
        )
    if action == "region" and config.model.region_format == "text":
        raise ConfigError("generation.action=region is for models with region tokens; this one writes regions as text")
    if action not in actions[:2] and not generation.max_actions:
        raise ConfigError(f"generation.max_actions=0 forbids what generation.action={action} asks for; leave one out")


def _is_folder(path: str) -> bool:
    try:
        return Path(path).is_dir()
    except (OSError, ValueError):  # a name too long, or with a NUL
        return False


def _check_token_prefixes(encoders: Mapping[str, EncoderConfig]) -> None:
    """A re-encoder is found by what its tokens and placeholders (`<detection_image>`) begin with."""
    owners: dict[str, str] = {}
    for name, encoder in encoders.items():
        prefix = encoder.token_prefix
        instead = f"type encoder.{name}.token_prefix={re.sub('[^a-z0-9]', '', name.lower()) or 'other'}"
        if not re.fullmatch("[a-z0-9]+", prefix):
            raise ConfigError(f"encoder.{name}.token_prefix={prefix} must be small letters and digits; {instead}")
        if (owner := owners.setdefault(prefix, name)) != name:
            raise ConfigError(f"encoder.{name}.token_prefix={prefix} is that of encoder.{owner} too; {instead}")


def _check_encoder(name: str, encoder: EncoderConfig) -> None:
    if encoder.size not in encoder.sizes:
        raise ConfigError(f"encoder.{name}.size={encoder.size} is not one of its sizes, {', '.join(encoder.sizes)}")
    if encoder.frames not in ("middle", "all") and not (encoder.frames.isdigit() and int(encoder.frames)):
        raise ConfigError(f"encoder.{name}.frames={encoder.frames} is not middle, all, or a number of frames")
    check_arguments(
        f"encoder.{name}", encoder, RE_ENCODER, given=("context", "config"),
        more=encoder.sizes[encoder.size].options, method="build",
    )  # fmt: skip
    target = locate(encoder.target, f"encoder.{name}.target", RE_ENCODER)
    check_weight_folder(encoder.weights, f"encoder.{name}.path", target.types_of(encoder.options))
