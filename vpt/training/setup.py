"""From a configuration to a model that its processes can train: new or of a checkpoint, whole or sharded.

Every model is built on the meta device and compared with the tensors that are stored for it. A sharded one is sharded
before it gets memory, and each process reads its slices, one tensor at a time: it is never whole on one of them.
"""

from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch

from vpt.checkpoint.frozen_weights import CheckpointTensors, FrozenWeights
from vpt.checkpoint.initialize import initialize, materialize
from vpt.checkpoint.load import build_from_checkpoint, build_new
from vpt.checkpoint.pretrained import StoredWeights
from vpt.checkpoint.resume import WarmStart
from vpt.config.schema import TrainConfig
from vpt.config.validate_rl import check_not_sharded
from vpt.config.weight_folder import weight_paths
from vpt.data.build import check_sources
from vpt.distributed.process_group import World
from vpt.distributed.strategy import SHARDED, Strategy, build_strategy, choose_strategy
from vpt.errors import ConfigError
from vpt.flops import FlopMeter
from vpt.models.build import ModelBundle
from vpt.models.frozen_dtype import cast_frozen
from vpt.models.inner_forward import compile_layers
from vpt.training.optimizer import set_trainable


class BuiltTraining(NamedTuple):
    """A run's model, shared among its processes; its FLOP meter, made while it was whole; what is as in its folders."""

    bundle: ModelBundle
    strategy: Strategy
    meter: FlopMeter
    frozen: FrozenWeights


def build_training(config: TrainConfig, found: Path | None, world: World, device: torch.device) -> BuiltTraining:
    """Build a run's model and shard or copy it as configured.

    Weights of the checkpoint `found` are still to be read. Raises UserError for whatever cannot run.
    """
    check_sources(config, "train", "test")  # before anything is fetched or read
    start = WarmStart.of(config) if config.init_from and not found else None
    paths, stored = weight_paths(config), list[StoredWeights]()
    if found:
        frozen = FrozenWeights.named_by(found, paths, strict=True)
        bundle = build_from_checkpoint(found, config, CheckpointTensors(found, frozen).shapes)
    else:
        bundle, stored = build_new(config)
    model = bundle.model
    set_trainable(model, config.optim, tower_pretrained=config.model.path is not None)
    cast_frozen(model, config.model.frozen_dtype)
    if not found:
        frozen = FrozenWeights.of(model, stored, paths)
    meter = FlopMeter(model)
    kind = config.strategy.kind
    chosen = replace(config.strategy, kind=choose_strategy(model, world, device) if kind == "auto" else kind)
    check_not_sharded(config, chosen.kind)
    if config.training.compile:
        compile_layers(model.language.layers)

    def fill() -> None:
        materialize(model, device, cpu_offload=chosen.cpu_offload)
        torch.manual_seed(config.seed)
        if not found:
            initialize(bundle, stored)

    sharded = chosen.kind in SHARDED
    if sharded and config.optim.name == "adamw_8bit":
        raise ConfigError(f"optim.name=adamw_8bit cannot step shards (strategy={chosen.kind}); type strategy=ddp")
    if not sharded:
        fill()
    strategy = build_strategy(chosen, model, world, device, precision=config.training.precision)
    if sharded:
        fill()
    if start is not None:
        frozen = start.load(model, frozen, quiet=not world.is_main)
    return BuiltTraining(bundle, strategy, meter, frozen)
