"""Configurations of `train.py`, for the benches that measure what it runs; those in `gpu/` do without Hydra."""

from hydra import compose, initialize_config_dir

from vpt.config.overrides import CONF, register_schemas
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate


def composed(*overrides: str) -> TrainConfig:
    """The configuration of `python train.py OVERRIDES`."""
    register_schemas()
    with initialize_config_dir(str(CONF), version_base=None):
        config = resolve_config(compose("train", overrides=list(overrides)), TrainConfig)
    validate(config)
    return config
