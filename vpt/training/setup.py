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
from vpt.checkpoint.tensors import fill
from vpt.config.schema import StrategyConfig, TrainConfig
from vpt.config.validate import whole_model_keys
from vpt.config.weight_folder import weight_paths
from vpt.data.build import check_sources
from vpt.distributed.process_group import World
from vpt.distributed.strategy import SHARDED, Strategy, build_strategy, choose_strategy
from vpt.errors import ConfigError
from vpt.flops import FlopMeter
from vpt.models.build import ModelBundle
from vpt.models.frozen_dtype import cast_frozen
from vpt.models.inner_forward import compile_layers
from vpt.models.quantization import base_weights, quantize_base
from vpt.models.vpt import VPTModel
from vpt.training.optimizer import parameter_table, set_trainable


class BuiltTraining(NamedTuple):
    """A run's model, shared among its processes.

    Attributes:
        meter, table: its FLOP meter and the table of its parameters, made while it was whole.
        frozen: what is as in its folders.
    """

    bundle: ModelBundle
    strategy: Strategy
    meter: FlopMeter
    table: str
    frozen: FrozenWeights


def build_training(config: TrainConfig, found: Path | None, world: World, device: torch.device) -> BuiltTraining:
    """Build a run's model and shard or copy it as configured.

    What the checkpoint `found` holds is still to be read. Raises UserError for whatever cannot run.
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
    meter, table = FlopMeter(model), parameter_table(model)
    chosen = _choose(config, model, world, device)
    if config.training.compile:
        compile_layers(model.language.layers)

    def load_weights() -> FrozenWeights:
        later = [layer.weight for _, layer in base_weights(model)] if config.model.load_in_4bit else []
        materialize(model, device, cpu_offload=chosen.cpu_offload, leave=later)
        torch.manual_seed(config.seed)
        if found:
            fill(model, frozen)
        else:
            initialize(bundle, stored)
        left = start.load(model, frozen, quiet=not world.is_main) if start is not None else frozen
        if config.model.load_in_4bit:
            quantize_base(model, left, device)
        return left

    if chosen.kind in SHARDED:
        strategy = build_strategy(chosen, model, world, device, precision=config.training.precision)
        return BuiltTraining(bundle, strategy, meter, table, load_weights())
    frozen = load_weights()
    strategy = build_strategy(chosen, model, world, device, precision=config.training.precision)
    return BuiltTraining(bundle, strategy, meter, table, frozen)


def _choose(config: TrainConfig, model: VPTModel, world: World, device: torch.device) -> StrategyConfig:
    """The strategy, which `auto` leaves open. Raises ConfigError for one that the run cannot have."""
    kind = config.strategy.kind
    chosen = replace(config.strategy, kind=choose_strategy(model, world, device) if kind == "auto" else kind)
    for key in whole_model_keys(config):
        if chosen.kind in SHARDED:
            raise ConfigError(f"{key} is for whole models, not for shards (strategy={chosen.kind}); type strategy=ddp")
    return chosen
