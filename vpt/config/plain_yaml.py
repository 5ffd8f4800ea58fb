"""Files of plain values, as saved configurations are: read without resolving, or building, anything."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf

from vpt.errors import ConfigError


def read_values(file: Path) -> DictConfig:
    """Parse a YAML file that holds values and nothing else, as a saved configuration does.

    Raises ConfigError for an interpolation (it could read the environment), an alias (a few of them can stand for
    billions of values), and for anything but a mapping.
    """
    text = file.read_text(encoding="utf-8")
    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
        raise ConfigError("it has an alias (*NAME); write out what that stands for")
    values = OmegaConf.load(file)
    if not isinstance(values, DictConfig):
        raise ConfigError("it is not a mapping of keys to values")
    for key, value in _texts(OmegaConf.to_container(values, resolve=False)):
        if "${" in value:
            raise ConfigError(f"{key}={value} is an interpolation; a saved configuration holds values")
    return values


def _texts(tree: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Every string of a tree with its dotted key, keys included."""
    if isinstance(tree, str):
        yield key, tree
    elif isinstance(tree, Mapping):
        for name, value in tree.items():
            yield from _texts(str(name), key)
            yield from _texts(value, f"{key}.{name}".lstrip("."))
    elif isinstance(tree, list):
        for value in tree:
            yield from _texts(value, key)
