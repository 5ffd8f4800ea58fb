"""From a configuration to a model that its processes can train: new or of a checkpoint, whole or sharded.

Sharded models with weights to read are built as shapes (`meta`), sharded, and then filled: every process reads its
slices, one tensor at a time, so that the model is never whole on one of them. That goes for a folder of Qwen's, a
upstream checkpoint and one of our own. Random weights, and re-encoders that come from folders of their own, are small
enough to be built whole first.
"""

import math
from dataclasses import replace
from pathlib import Path

import torch
from torch import nn

from vpt.checkpoint.load import build_from_checkpoint, build_model
from vpt.checkpoint.resume import resolve_init_from, warm_start
from vpt.checkpoint.sharded_init import load_base_weights, materialize
from vpt.config.schema import TrainConfig
from vpt.distributed.dtensor import shard_like
from vpt.distributed.process_group import World
from vpt.distributed.strategy import SHARDED, Strategy, build_strategy, choose_strategy
from vpt.flops import FlopMeter
from vpt.models.build import ModelBundle
from vpt.models.inner_forward import compile_layers
from vpt.models.lora import LORA_A, LORA_B
from vpt.training.optimizer import set_trainable


def build_training(
    config: TrainConfig, found: Path | None, world: World, device: torch.device
) -> tuple[ModelBundle, Strategy, FlopMeter]:  # fmt: skip
    """Build a run's model and shard or copy it as configured; its FLOP meter is made while it is whole.

    Weights of the checkpoint `found` are still to be read. Raises UserError for whatever cannot run.
    """
    start = resolve_init_from(config.init_from) if config.init_from and not found else None
    kind = config.strategy.kind
    readable = found is not None or config.model.path is not None
    bare = readable and (kind in SHARDED or (kind == "auto" and world.size > 1))
    bundle = _bundle(config, found, bare=bare)
    if kind == "auto":
        kind = choose_strategy(bundle.model, world, device)
        if bare and kind not in SHARDED:  # small enough to be whole
            bare, bundle = False, _bundle(config, found, bare=False)
    model = bundle.model
    if not bare and not found:
        reset_adapters(model.language, seed=config.seed)
    meter = FlopMeter(model)
    chosen = replace(config.strategy, kind=kind)
    if config.training.compile:
        compile_layers(model.language.layers)
    strategy = build_strategy(chosen, model, world, device, precision=config.training.precision)
    if bare:
        materialize(model, device)
    if bare and not found:
        load_base_weights(model, str(config.model.path))
        reset_adapters(model.language, seed=config.seed)
    if start is not None:
        warm_start(model, start, without=config.init_exclude, quiet=not world.is_main)
    return bundle, strategy, meter


def _bundle(config: TrainConfig, found: Path | None, *, bare: bool) -> ModelBundle:
    """Model, tokenizer and processor, with `requires_grad` set; `bare` leaves weights that files hold on `meta`."""
    torch.manual_seed(config.seed)
    bundle = build_from_checkpoint(found, config, bare=bare) if found else build_model(config, bare=bare)
    set_trainable(bundle.model, config.optim, tower_pretrained=config.model.path is not None)
    return bundle


def reset_adapters(language: nn.Module, *, seed: int) -> None:
    """Draw A and zero B as peft does, but from `seed` alone, so that a sharded model starts as a whole one does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if name.endswith(LORA_A):
                drawn = torch.empty(parameter.shape)
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(shard_like(drawn.to(parameter.dtype), parameter.detach()))
            elif name.endswith(LORA_B):
                parameter.zero_()
