"""From a composed configuration to its schema: unknown keys, wrong types and impossible values stop here."""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from vpt.config.former_names import present_name
from vpt.errors import ConfigError, did_you_mean, first_line

Schema = TypeVar("Schema")
# Kept of each schema, for many configurations of it are read in one process: `merge` copies its first argument.
_structured: Callable[[Any], Any] = cache(OmegaConf.structured)
_type_hints: Callable[[Any], dict[str, Any]] = cache(get_type_hints)


def resolve_config(composed: DictConfig, schema: type[Schema]) -> Schema:
    """Merge a configuration that Hydra composed into a fresh schema.

    Raises ConfigError for unknown keys (with the nearest right ones), wrong types, values out of range, missing values.
    """
    try:
        plain = OmegaConf.to_container(composed, resolve=True, throw_on_missing=True)
    except MissingMandatoryValue as error:
        raise ConfigError(f"{error.full_key} has no value; type {error.full_key}=VALUE") from None
    except OmegaConfBaseException as error:
        raise ConfigError(f"the configuration does not resolve: {error}") from None
    if unknown := [*_unknown_keys(plain, schema)]:
        known = list(key_paths(schema))
        raise ConfigError("\n".join(explain_unknown(path, known) for path in unknown))
    try:
        merged = OmegaConf.merge(_structured(schema), plain)
        config: Schema = OmegaConf.to_object(merged)  # type: ignore[assignment]
    except OmegaConfBaseException as error:
        raise ConfigError(f"{error.full_key or 'configuration'}: {first_line(error)}") from None
    check_values(config, "")
    return config


def key_paths(schema: type, prefix: str = "") -> Iterator[str]:
    """Every dotted key of a schema; `*` stands for a name that the user chooses."""
    hints = _type_hints(schema)
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
    hints = _type_hints(schema)
    for key, value in plain.items():
        path = f"{prefix}{key}"
        if key not in hints:
            yield path
        elif is_dataclass(hints[key]):
            yield from _unknown_keys(value, hints[key], f"{path}.")
        elif (inner := _dict_of_dataclass(hints[key])) is not None and isinstance(value, Mapping):
            for name, entry in value.items():
                yield from _unknown_keys(entry, inner, f"{path}.{name}.")


def explain_unknown(path: str, known: list[str]) -> str:
    if present := present_name(path):
        return f"{path} is now {present}"
    return f"{path} is not a key of the configuration{did_you_mean(path, known)}"


def check_values(config: Any, prefix: str) -> None:
    """Raise ConfigError for values outside the choices and ranges that fields declare."""
    for item in fields(config):
        path, value = f"{prefix}{item.name}", getattr(config, item.name)
        choices, limits = item.metadata.get("choices"), item.metadata.get("range")
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{path}={value} is not one of {', '.join(choices)}{did_you_mean(str(value), list(choices))}"
            )
        if limits and value is not None and not limits[0] <= value <= limits[1]:
            raise ConfigError(f"{path}={value} must lie between {limits[0]} and {limits[1]}")
        expected = get_args(_type_hints(type(config))[item.name])
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
    """Raise ConfigError for an item of another type: OmegaConf does not check them. Of `list[X] | None`, X counts."""
    kinds = tuple(kind for entry in expected for kind in (get_args(entry) or (entry,)))
    for value in values:
        if not isinstance(value, kinds):
            raise ConfigError(f"{path} holds values of type {kinds[0].__name__}, {value!r} is none")
        if isinstance(value, float) and not math.isfinite(value):
            raise ConfigError(f"{path}: {value} is no number to work with")
