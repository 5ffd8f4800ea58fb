"""What a run will need, from its configuration alone; loads nothing, fetches nothing, writes nothing.

python -m vpt.describe +experiment=dino model=qwen2_vl_2b
python -m vpt.describe +experiment=dino model=qwen2_vl_2b gpus=64 strategy=fsdp
python -m vpt.describe +experiment=dino model=qwen2_vl_2b gpus=8 describe.gpu=h100 describe.image=[512,512]
python -m vpt.describe +experiment=free_choice model=qwen2_vl_2b 'describe.actions={none:307,region:229,dino:293}'

Prints modules with their parameters, tokens and FLOPs of a sample, memory of a GPU by part, speed, days and sizes of
checkpoints. Overrides are those of train.py, and:

"""

import argparse
import sys
from dataclasses import fields, replace

from hydra import compose, initialize_config_dir
from hydra.errors import HydraException
from omegaconf import OmegaConf

from vpt import cli
from vpt.config import TrainConfig
from vpt.describe.settings import EstimateConfig
from vpt.errors import ConfigError, UserError
from vpt.freeze import resolve_config, validate

_TRAINED_WITH = {item.name for item in fields(TrainConfig)}
OWN_KEYS = [item.name for item in fields(EstimateConfig) if item.name not in _TRAINED_WITH]


def compose_description(overrides: list[str]) -> EstimateConfig:
    """The configuration that overrides of `train.py` and of this program describe.

    Raises:
        ConfigError: as `train.py` does.
    """
    cli.check_overrides(overrides, EstimateConfig)
    ours = [_ours(text) for text in overrides]
    try:
        with initialize_config_dir(str(cli.CONF), version_base=None):
            composed = compose("train", overrides=ours)
    except HydraException as error:
        raise ConfigError(str(error).splitlines()[0]) from None
    if OmegaConf.is_missing(composed.data, "root"):
        composed.data.root = None  # no record is read
    config = resolve_config(composed, EstimateConfig)
    if config.describe.actions:
        config = replace(config, data=replace(config.data, actions=config.describe.actions))
    validate(config)
    return config


def _ours(override: str) -> str:
    """A key of this program as one that is added to those of `train.py`."""
    key = override.partition("=")[0]
    return f"+{override}" if key.split(".")[0] in OWN_KEYS else override


def help_text() -> str:
    """The keys of this program and their defaults."""
    defaults = EstimateConfig(run_name="")
    return OmegaConf.to_yaml(OmegaConf.create({key: getattr(defaults, key) for key in OWN_KEYS}))


def main(arguments: list[str]) -> None:
    """Print the description."""
    parser = argparse.ArgumentParser(
        "python -m vpt.describe", description=f"{__doc__}{help_text()}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    try:
        config = compose_description(parser.parse_args(arguments).overrides)
        from vpt.describe.blueprint import build_on_meta  # the heavy part, after all that can be wrong has been checked
        from vpt.describe.report import Report

        for line in Report(config, build_on_meta(config)):
            print(line)
    except UserError as error:
        cli.exit_with(error)


if __name__ == "__main__":
    main(sys.argv[1:])
