"""Give a model on the meta device its memory and its weights, whole or each process its slices.

base model      read tensor by tensor from a folder of Qwen's or an upstream checkpoint, or drawn at random
re-encoders     likewise; what no folder holds, such as projectors, is built whole and copied
adapters        drawn from the seed alone
"""

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from vpt.checkpoint.pretrained import Place, StoredWeights
from vpt.distributed.dtensor import shard_like
from vpt.models.architecture import Architecture
from vpt.models.build import ModelBundle, build_encoder
from vpt.models.lora import LORA_A, LORA_B
from vpt.models.qwen import base_sizes, build_qwen
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER


def materialize(
    model: VPTModel, device: torch.device | str, *, cpu_offload: bool = False, leave: Collection[Tensor] = ()
) -> None:  # fmt: skip
    """Give tensors on the meta device memory on `device`, without values, and buffers that no file holds theirs.

    Args:
        model: of which some or all is on the meta device.
        device: where it is to be.
        cpu_offload: parameters are on the CPU.
        leave: tensors that stay without memory.
    """
    unset = [
        (part, module)
        for part in (model.qwen, *model.visions.values())
        for module in part.modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    left = {*map(id, leave)}

    def memory(tensor: Tensor) -> Tensor:
        place = "cpu" if cpu_offload and isinstance(tensor, nn.Parameter) else device
        return torch.empty_like(tensor, device=place) if tensor.is_meta and id(tensor) not in left else tensor

    model._apply(memory)
    model.qwen.tie_weights()
    for part, module in unset:
        part._init_weights(module)  # rotary frequencies, numbers of positions


def initialize(bundle: ModelBundle, stored: Sequence[StoredWeights]) -> None:
    """Fill a new model that has memory: from what is stored, and all else from the global random state and the seed."""
    model, config = bundle.model, bundle.config
    if not any("qwen.".startswith(part.prefix) for part in stored):
        _draw_base(bundle).load(model)
    if all(part.prefix for part in stored):
        sizes = Architecture.of(model).encoders
        for name in config.encoder:
            transform = bundle.processor.transforms[VISION_TOWER]
            _copy(build_encoder(config, name, model.qwen, transform, sizes=sizes.get(name, {})), model.encoder(name))
    for part in stored:
        part.load(model)
    reset_adapters(model.language, seed=config.seed)


def _draw_base(bundle: ModelBundle) -> StoredWeights:
    """Random weights of the base model, whole, by transformers' own initialisers."""
    settings = bundle.config.model
    tensors = build_qwen(settings, base_sizes(settings, bundle.model.vocabulary)).state_dict()
    return StoredWeights(tensors, {f"qwen.{name}": Place(name) for name in tensors}, "qwen.")


@torch.no_grad()
def _copy(whole: nn.Module, own: nn.Module) -> None:
    """Copy the tensors of a module, those on the meta device apart, into another like it, which may be sharded."""
    tensors: dict[str, Any] = whole.state_dict()
    for name, target in own.state_dict(keep_vars=True).items():
        if not tensors[name].is_meta:
            target.detach().copy_(shard_like(tensors[name].to(target.dtype), target.detach()))


def reset_adapters(language: nn.Module, *, seed: int) -> None:
    """Draw A and zero B as peft does, but from `seed` alone, so that a sharded model starts as a whole one does."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in language.named_parameters():
            if name.endswith(LORA_A):
                drawn = torch.empty(parameter.shape, device="cpu")
                nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator)
                parameter.copy_(shard_like(drawn.to(parameter.dtype), parameter.detach()))
            elif name.endswith(LORA_B):
                parameter.zero_()
