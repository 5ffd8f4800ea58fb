"""Freezing a composed configuration: unknown keys, wrong types, impossible values stop here, before anything loads."""

import importlib
import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vpt.config import (
    AskConfig,
    ControlConfig,
    EncoderConfig,
    EvalConfig,
    EvalGenerationConfig,
    GenerationConfig,
    SourceConfig,
    TrainConfig,
)
from vpt.errors import ConfigError, did_you_mean

# What a `target` must be
SOURCE, RE_ENCODER = "vpt.data.sources.Source", "vpt.encoders.base.ReEncoder"
METRIC, ABLATION = "vpt.evaluation.metrics.base.Metric", "vpt.evaluation.controls.base.Ablation"

Schema = TypeVar("Schema", bound=TrainConfig | EvalConfig | AskConfig)


def resolve_config(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Merge what Hydra composed into a fresh schema.

    Raises:
        ConfigError: for unknown keys (with the nearest right ones), wrong types, values out of range, missing values.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; type {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration does not resolve: {error}") from None
    known = list(key_paths(schema))
    unknown = [_explain(path, known) for path in _unknown_keys(plain, schema)]
    if unknown:
        raise ConfigError("\n".join(unknown))
    try:
        merged = OmegaConf.merge(OmegaConf.structured(schema), plain)
        config: Schema = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {str(error).splitlines()[0]}") from None
    check_values(config, "")
    return config


def key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; `*` stands for a name that the user chooses."""
    hints = get_type_hints(schema)
    for item in fields(schema):
        path, kind = f"{prefix}{item.name}", hints[item.name]
        yield path
        if isinstance(kind, type) and is_dataclass(kind):
            yield from key_paths(kind, f"{path}.")
        elif (inner := _dict_of_dataclass(kind)) is not None:
            yield f"{path}.*"
            yield from key_paths(inner, f"{path}.*.")


def _dict_of_dataclass(kind: Any) -> type | None:
    arguments = get_args(kind)
    if get_origin(kind) is dict and isinstance(arguments[1], type) and is_dataclass(arguments[1]):
        return arguments[1]
    return None


def _unknown_keys(plain: Any, schema: type, prefix: str = "") -> Iterator[str]:
    if not isinstance(plain, Mapping):
        return  # a wrong type: the merge says so
    hints = get_type_hints(schema)
    for key, value in plain.items():
        path = f"{prefix}{key}"
        if key not in hints:
            yield path
        elif is_dataclass(hints[key]):
            yield from _unknown_keys(value, hints[key], f"{path}.")
        elif (inner := _dict_of_dataclass(hints[key])) is not None and isinstance(value, Mapping):
            for name, entry in value.items():
                yield from _unknown_keys(entry, inner, f"{path}.{name}.")


def _explain(path: str, known: list[str]) -> str:
    return f"{path} is not a key of the configuration{did_you_mean(path, known)}"


def check_values(config: Any, prefix: str) -> None:
    """Choices and ranges that the fields declare."""
    for item in fields(config):
        path, value = f"{prefix}{item.name}", getattr(config, item.name)
        choices, limits = item.metadata.get("choices"), item.metadata.get("range")
        if choices and value not in choices:
            raise ConfigError(
                f"{path}={value} is not one of {', '.join(choices)}{did_you_mean(str(value), list(choices))}"
            )
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            raise ConfigError(f"{path}={value} must lie between {limits[0]} and {limits[1]}")
        expected = get_args(get_type_hints(type(config))[item.name])
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}={value} is no number to work with")
        if isinstance(value, list):
            _check_items(value, expected, path)
        if isinstance(value, dict) and expected[1] in (int, float):
            _check_items([*value.values()], expected[1:], path)
        if is_dataclass(value):
            check_values(value, f"{path}.")
        elif isinstance(value, dict):
            for name, entry in value.items():
                if is_dataclass(entry):
                    check_values(entry, f"{path}.{name}.")


def _check_items(values: list[Any], expected: tuple[Any, ...], path: str) -> None:
    """OmegaConf lets a list or a dictionary stand among texts and numbers. Of `list[X] | None`, X counts."""
    kinds = tuple(kind for entry in expected for kind in (get_args(entry) or (entry,)))
    for value in values:
        if not isinstance(value, kinds):
            raise ConfigError(f"{path} holds values of type {kinds[0].__name__}, {value!r} is none")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}: {value} is no number to work with")


def validate(config: TrainConfig) -> None:
    """What one field alone cannot tell. Raises ConfigError; loads no weights and no data."""
    from vpt.evaluation.summary import metrics_of  # it takes `locate` from here

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
    for name, encoder in config.encoder.items():
        _check_encoder(name, encoder)
    for split in ("train", "test"):
        for name, source in getattr(config.data, split).items():
            check_arguments(f"data.{split}.{name}", source, SOURCE, given=("context",))
    if config.data.plain_looks and config.data.perception:
        raise ConfigError("data.plain_looks=true takes the place of perception; type data.perception=false with it")
    metrics_of(config.data)
    if config.data.root is not None and not _is_folder(config.data.root):
        raise ConfigError(f"data.root={config.data.root} is not a folder; type data.root=FOLDER")
    if config.model.path is None and not config.model.config:
        raise ConfigError("model.path is not set and model.config has no sizes; type model.path=FOLDER or model=tiny")
    if config.model.lora.rank and find_spec("peft") is None:
        raise ConfigError(f"model.lora.rank={config.model.lora.rank} needs the package peft; type: pip install peft")
    for path in (config.model.path, *(encoder.path for encoder in config.encoder.values())):
        check_folder_or_hub(path)


def _check_numbers(config: TrainConfig) -> None:
    """Numbers that only make sense together."""
    if len(config.optim.betas) != 2 or not all(0 <= beta < 1 for beta in config.optim.betas):
        raise ConfigError(f"optim.betas={config.optim.betas} must be two numbers, each from 0 to below 1")
    for name, limits in (("image", config.data.image), ("video", config.data.video)):
        if limits.min_pixels > limits.max_pixels:
            raise ConfigError(
                f"data.{name}.min_pixels={limits.min_pixels} is above data.{name}.max_pixels={limits.max_pixels}"
            )


def kinds_of(config: TrainConfig) -> list[str]:
    """What a model can do before it answers: nothing, select a region, look through one of its re-encoders."""
    return ["none", *(["region"] if config.model.region_bins else []), *config.encoder]


def generation_settings(trained: TrainConfig, chosen: EvalGenerationConfig) -> GenerationConfig:
    """How a trained model is to answer: as in its own configuration, but for what is chosen now.

    Raises:
        ConfigError: for values out of range, and for an action that the model lacks.
    """
    given = {item.name: getattr(chosen, item.name) for item in fields(chosen)}
    merged = replace(trained.generation, **{key: value for key, value in given.items() if value is not None})
    check_values(merged, "generation.")
    _check_action(merged, trained)
    return merged


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


def check_folder_or_hub(path: str | None) -> None:
    """A path must exist unless it is spelt like a hub name, OWNER/NAME."""
    if path is None or _is_folder(path):
        return
    if path.startswith((".", "/", "~")) or path.count("/") != 1:
        raise ConfigError(f"folder {path} does not exist; give a folder of weights or a hub name OWNER/NAME")


def _check_encoder(name: str, encoder: EncoderConfig) -> None:
    if encoder.size not in encoder.sizes:
        raise ConfigError(f"encoder.{name}.size={encoder.size} is not one of its sizes, {', '.join(encoder.sizes)}")
    check_arguments(
        f"encoder.{name}", encoder, RE_ENCODER, given=("context", "config", "weights"),
        more=encoder.sizes[encoder.size].options, method="build",
    )  # fmt: skip


def check_arguments(
    path: str, node: EncoderConfig | SourceConfig | ControlConfig, contract: str, *, given: tuple[str, ...],
    more: Mapping[str, Any] | None = None, method: str | None = None,
) -> None:  # fmt: skip
    """Bind a node's `options` to what its `target` takes, so that a typo in them is found before anything is built."""
    target = locate(node.target, f"{path}.target", contract)
    parameters = inspect.signature(getattr(target, method) if method else target).parameters
    allowed = [name for name in parameters if name not in given]
    for key in {**node.options, **(more or {})}:
        if key not in allowed:
            raise ConfigError(
                f"{path}.options.{key} is not an option of {node.target}; it takes {', '.join(allowed) or 'none'}"
                f"{did_you_mean(key, allowed)}"
            )


def locate(target: str, path: str, contract: str) -> Any:
    """The class that a dotted name stands for. Raises ConfigError unless it is a `contract`, another dotted name."""
    found, expected = _imported(target), _imported(contract)
    if not isinstance(found, type):
        raise ConfigError(f"{path}={target} is not an importable class")
    if not issubclass(found, expected) or inspect.isabstract(found):
        raise ConfigError(f"{path}={target} is no {expected.__name__} ({expected.__module__})")
    return found


def _imported(target: str) -> Any:
    """What a dotted name stands for, or None."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError, ValueError):
        return None
