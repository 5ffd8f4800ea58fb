"""Wrong keys and group options on a command line, found before Hydra composes anything, with the nearest right name."""

import re
from collections.abc import Sequence
from contextlib import ExitStack
from functools import cache
from pathlib import Path
from typing import TypeVar

from hydra import compose, initialize_config_dir
from hydra.conf import HydraConf, RunDir, SweepDir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from vpt.config.evaluation import EvalConfig
from vpt.config.resolve import explain_unknown, key_paths, resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.config.weight_folder import ASSETS
from vpt.errors import ConfigError, did_you_mean, first_line

Config = TypeVar("Config", bound=TrainConfig)
CONF = Path(__file__).resolve().parents[2] / "conf"
_OVERRIDE = re.compile(r"^(?P<sign>\+{0,2}|~)(?P<key>[\w./@]+)(=(?P<value>.*))?$", re.DOTALL)


def _defaults(schema: type) -> DictConfig:
    """Every key with its default, for Hydra to start from.

    As plain values: `resolve_config` checks types and names, with messages that say what to type. Dictionaries whose
    names a user chooses take new ones from the command line without a `+`.
    """
    defaults = OmegaConf.create(OmegaConf.to_container(OmegaConf.structured(schema)))
    assert isinstance(defaults, DictConfig)
    paths = list(key_paths(schema))
    for path in paths:
        node = OmegaConf.select(defaults, path, throw_on_missing=False) if "*" not in path else None
        fixed = (other for other in paths if other.startswith(f"{path}.") and not other.startswith(f"{path}.*"))
        if isinstance(node, DictConfig) and next(fixed, None) is None:
            node._set_flag("struct", False)
    return defaults


@cache  # once in a process is enough, and it takes a tenth of a second
def register_schemas() -> None:
    """Make known to Hydra what conf/ refers to (`train_defaults`, `eval_defaults`, and `asset`, a folder of weights),
    and in which folders runs lie, whatever file they are configured by: a run's own config.yaml, too.
    """
    folders = HydraConf(
        output_subdir=None,  # a run writes its config.yaml itself
        run=RunDir("${output_dir}/${run_name}"),
        sweep=SweepDir("${output_dir}", "${run_name}/${member_name:${hydra:job.override_dirname}}"),
    )
    ConfigStore.instance().store("config", folders, group="hydra", provider="vpt")
    OmegaConf.register_new_resolver("asset", lambda name: str(ASSETS / name), replace=True)
    for name, schema in (("train_defaults", TrainConfig), ("eval_defaults", EvalConfig)):
        ConfigStore.instance().store(name, _defaults(schema))


def compose_train(overrides: Sequence[str]) -> TrainConfig:
    """The configuration of `python train.py OVERRIDES`, checked."""
    return compose_as(TrainConfig, overrides)


def compose_as(schema: type[Config], overrides: Sequence[str]) -> Config:
    """The same in a schema that may have further keys. Raises ConfigError for what does not exist."""
    register_schemas()
    with ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # eval.py has done so
            stack.enter_context(initialize_config_dir(str(CONF), version_base=None))
        try:
            composed = compose("train", overrides=[*overrides])
        except HydraException as error:
            raise ConfigError(first_line(error)) from None
        config = resolve_config(composed, schema)
    validate(config)
    return config


def check_overrides(arguments: list[str], schema: type) -> None:
    """Raise ConfigError, with the nearest right name, for an unknown key or an option that a group lacks."""
    known = list(key_paths(schema))
    groups = {path.name: sorted(_options(path)) for path in CONF.iterdir() if path.is_dir()}
    for argument in arguments:
        match = _OVERRIDE.match(argument)
        if "=" not in argument or match is None or match["key"].startswith("hydra"):
            continue  # a flag of Hydra's, its value, or a setting of Hydra itself
        key, value = match["key"], match["value"] or ""
        if key in groups:
            _check_group(key, value, groups[key])
        elif not _is_known(key, known) and "@" not in key:
            raise ConfigError(explain_unknown(key, [*known, *groups]))


def _options(group: Path) -> list[str]:
    return [path.relative_to(group).with_suffix("").as_posix() for path in group.rglob("*.yaml")]


def _check_group(group: str, value: str, options: list[str]) -> None:
    for choice in value.strip("[]").split(","):
        choice = choice.strip()
        if choice and choice not in options and choice != "null":
            raise ConfigError(
                f"{group}={choice} does not exist{did_you_mean(choice, options)}; there is {', '.join(options)}"
            )


def _is_known(key: str, known: list[str]) -> bool:
    """A dotted key is in the schema; below a free dictionary any key is, and is checked when composed."""
    parts = key.split(".")
    for length in range(len(parts), 0, -1):
        prefix = ".".join(parts[:length])
        for path in known:
            if re.fullmatch(re.escape(path).replace(r"\*", r"[^.]+"), prefix):
                return length == len(parts) or not any(other.startswith(f"{path}.") for other in known)
    return False
