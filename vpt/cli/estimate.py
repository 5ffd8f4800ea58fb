"""Estimate what a run will need from its configuration alone; loads nothing, fetches nothing, writes nothing.

vpt estimate +experiment=dino model=qwen2_vl_2b
vpt estimate +experiment=dino model=qwen2_vl_2b gpus=64 strategy=fsdp
vpt estimate +experiment=dino model=qwen2_vl_2b gpus=8 assume.gpu=h100 assume.image=[512,512]
vpt estimate --smallest-gpu
vpt estimate +experiment=free_choice model=qwen2_vl_2b 'assume.actions={none:307,region:229,dino:293}'

Prints modules with their parameters, tokens and FLOPs of a sample, memory of a GPU by part, speed, days and sizes of
checkpoints. Overrides are those of train.py, and:

"""

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import fields, replace

from omegaconf import OmegaConf

from vpt.config.overrides import check_overrides, compose_as
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.config.weight_folder import check_model_group
from vpt.estimate.report import Report
from vpt.estimate.settings import EstimateConfig, build_on_meta
from vpt.estimate.smallest_gpu import smallest_gpu_table

_TRAINED_WITH = {item.name for item in fields(TrainConfig)}
OWN_KEYS = [item.name for item in fields(EstimateConfig) if item.name not in _TRAINED_WITH]


def compose_description(overrides: list[str]) -> EstimateConfig:
    """The configuration that overrides of `train.py` and of this program describe. Raises ConfigError as those do."""
    check_overrides(overrides, EstimateConfig)
    config = compose_as(EstimateConfig, [_ours(text) for text in overrides])
    if config.assume.actions:
        config = replace(config, data=replace(config.data, actions=config.assume.actions))
        validate(config)
    check_model_group(config.model, overrides)
    return config


def _ours(override: str) -> str:
    """A key of this program as one that is added to those of `train.py`."""
    key = override.partition("=")[0]
    return f"+{override}" if key.split(".")[0] in OWN_KEYS else override


def help_text() -> str:
    """Keys of this program and their defaults, as YAML."""
    defaults = EstimateConfig(run_name="")
    return OmegaConf.to_yaml(OmegaConf.create({key: getattr(defaults, key) for key in OWN_KEYS}))


def main(arguments: Sequence[str]) -> None:
    """`vpt estimate`."""
    parser = argparse.ArgumentParser(
        prog="vpt estimate", description=f"{__doc__}{help_text()}", formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--smallest-gpu", action="store_true", help="a table of the published models instead")
    options = parser.parse_args(arguments)
    if options.smallest_gpu:
        lines: Iterable[str] = smallest_gpu_table(compose_description, options.overrides)
    else:
        config = compose_description(options.overrides)
        lines = Report(config, build_on_meta(config))
    for line in lines:
        print(line)
