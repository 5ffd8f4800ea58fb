"""Whether a run fits the memory that there is, told before anything is loaded, and the keys that would make it fit."""

from collections.abc import Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from omegaconf import OmegaConf

from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.distributed.process_group import World
from vpt.distributed.strategy import choose_strategy
from vpt.errors import ConfigError
from vpt.estimate.gpus import GIGA
from vpt.estimate.memory import Memory
from vpt.estimate.report import FULL, Report
from vpt.estimate.settings import EstimateConfig, build_on_meta
from vpt.utils.memory import available_memory

# Key -> value; what costs least comes first: nothing, smaller products, some of the moments' precision, a third more
# time, most trained weights, some of the base's precision
SAVERS: dict[str, Any] = {
    "model.frozen_dtype": "bfloat16", "training.micro_batch_size": 1, "optim.name": "adamw_8bit",
    "model.activation_checkpointing": True, "model.lora.rank": 16, "model.load_in_4bit": True,
}  # fmt: skip


def check_memory(config: TrainConfig, world: World, device: torch.device) -> str | None:
    """What to say about a run that may need more memory than there is; None where there is enough, and for models of
    sizes that fit everywhere.

    Raises:
        ConfigError: where weights, gradients and moments alone need more, which no data make smaller.
    """
    if config.model.size != "full":
        return None
    free = available_memory(device) / (world.local_size if device.type == "cpu" else 1)
    needed = needed_memory(config, world, device)
    if needed.total < FULL * free:
        return None
    state = needed.weights + needed.gradients + needed.optimizer
    said = (
        f"{needed.total / GIGA:.1f}e9 bytes are needed (weights {needed.weights / GIGA:.1f}, gradients "
        f"{needed.gradients / GIGA:.1f}, moments {needed.optimizer / GIGA:.1f}), and {free / GIGA:.1f}e9 are free on "
        f"{device}; {_advice(config, world, device, needed.total, free)}"
    )
    if state < free:
        return f"{said}. What samples need is estimated, so the run begins all the same"
    raise ConfigError(said)


def needed_memory(config: TrainConfig, world: World, device: torch.device) -> Memory:
    """Bytes on each GPU, or of each process on a CPU, under the strategy that the run takes there."""
    bundle, strategy = build_on_meta(config), config.strategy
    kind = choose_strategy(bundle.model, world, device) if strategy.kind == "auto" else strategy.kind
    plain = {item.name: getattr(config, item.name) for item in fields(TrainConfig)}
    plain["strategy"] = replace(strategy, kind=kind, shard_size=strategy.shard_size or world.local_size)
    report = Report(EstimateConfig(**plain, gpus=world.size), bundle)
    return report.predicted_memory(on_gpu=device.type == "cuda")


def _advice(config: TrainConfig, world: World, device: torch.device, total: float, free: float) -> str:
    """What to type so that a run that needs `total` bytes fits into those that are `free`."""
    keys = list[str]()
    for key in (*SAVERS, *SAVERS):  # a base that is frozen by a later key can be stored in fewer bits
        if key not in keys and (less := _needed_with(config, world, device, [*keys, key])) < 0.98 * total:
            keys, total = [*keys, key], less
        if total < FULL * free:
            break
    for key in reversed(keys[:-1]):  # some of the cheaper ones may do nothing that the others leave to do
        fewer = [other for other in keys if other != key]
        if (less := _needed_with(config, world, device, fewer)) < FULL * free:
            keys, total = fewer, less
    typed = " ".join(f"{key}={str(SAVERS[key]).lower()}" for key in keys)
    if total < FULL * free:
        return f"type {typed} ({total / GIGA:.1f}e9)"
    least = f"with {typed} it is {total / GIGA:.1f}e9; " if keys else ""
    return f"{least}take more GPUs (strategy=fsdp), a smaller model, or a smaller data.image.max_side"


def _needed_with(config: TrainConfig, world: World, device: torch.device, keys: Sequence[str]) -> float:
    """Bytes with some of SAVERS; infinite where the run cannot have them."""
    changed = OmegaConf.structured(config)
    for key in keys:
        OmegaConf.update(changed, key, SAVERS[key])
    found: TrainConfig = OmegaConf.to_object(changed)  # type: ignore[assignment]
    try:
        validate(found)
        return needed_memory(found, world, device).total
    except ConfigError:
        return float("inf")
