"""Parts as the configuration builds them, for figures about whole programs. Needs hydra."""

from vpt.config import TrainConfig


def composed(*overrides: str) -> TrainConfig:
    """What `python train.py OVERRIDES` runs on."""
    from hydra import compose, initialize_config_dir

    from vpt import cli
    from vpt.freeze import resolve_config, validate

    with initialize_config_dir(str(cli.CONF), version_base=None):
        config = resolve_config(compose("train", overrides=list(overrides)), TrainConfig)
    validate(config)
    return config
