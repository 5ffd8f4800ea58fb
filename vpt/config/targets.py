"""Classes that a configuration names by `target`: import them, and bind their options to their signatures."""

import importlib
import inspect
from collections.abc import Mapping
from typing import Any, Literal, get_args, get_origin

from vpt.config.evaluation import AblationConfig
from vpt.config.former_names import FORMER_TARGETS
from vpt.config.rl import RewardConfig
from vpt.config.schema import EncoderConfig, SourceConfig
from vpt.errors import ConfigError, did_you_mean

# Base classes of a `target`
SOURCE, RE_ENCODER = "vpt.data.sources.base.Source", "vpt.encoders.base.ReEncoder"
REWARD = "vpt.rl.rewards.Reward"
METRIC, ABLATION = "vpt.evaluation.metrics.base.Metric", "vpt.evaluation.ablations.base.Ablation"


def check_arguments(
    path: str, node: EncoderConfig | SourceConfig | AblationConfig | RewardConfig, contract: str, *,
    given: tuple[str, ...], more: Mapping[str, Any] | None = None, method: str | None = None,
) -> None:  # fmt: skip
    """Bind a node's `options` to what its `target` takes, so that a typo in them is found before anything is built.

    A value must be among those of its parameter's annotation where that is a `Literal`; null chooses nothing.
    """
    target = locate(node.target, f"{path}.target", contract)
    parameters = inspect.signature(getattr(target, method) if method else target).parameters
    allowed = [name for name in parameters if name not in given]
    for key, value in [*node.options.items(), *(more or {}).items()]:
        if key not in allowed:
            raise ConfigError(
                f"{path}.options.{key} is not an option of {node.target}; it takes {', '.join(allowed) or 'none'}"
                f"{did_you_mean(key, allowed)}"
            )
        choices = get_args(parameters[key].annotation) if get_origin(parameters[key].annotation) is Literal else ()
        if choices and value is not None and value not in choices:
            raise ConfigError(
                f"{path}.options.{key}={value} is not one of {', '.join(map(str, choices))}"
                f"{did_you_mean(str(value), [*map(str, choices)])}"
            )


def locate(target: str, path: str, contract: str) -> Any:
    """The class that a dotted name stands for. Raises ConfigError unless it is a `contract`, another dotted name."""
    found, expected = imported(FORMER_TARGETS.get(target, target)), imported(contract)
    if not isinstance(found, type):
        raise ConfigError(f"{path}={target} is not an importable class")
    if not issubclass(found, expected) or inspect.isabstract(found):
        raise ConfigError(f"{path}={target} is no {expected.__name__} ({expected.__module__})")
    return found


def imported(target: str) -> Any:
    """The object of a dotted name, or None."""
    module, _, name = target.rpartition(".")
    try:
        return getattr(importlib.import_module(module), name, None)
    except (ImportError, TypeError, ValueError):
        return None
