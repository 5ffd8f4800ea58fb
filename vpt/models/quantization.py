"""`model.load_in_4bit`: the frozen base under LoRA in 4 bits (NF4, QLoRA), by bitsandbytes.

A block of 64 weights shares one float32 scale, which is not compressed further: so what 4 bits stand for, brought into
4 bits again, is the same. Training holds the bits; a model that is loaded to answer or to be exported holds what they
stand for, and so computes what was trained.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vpt.errors import ConfigError, import_bitsandbytes
from vpt.models.vpt import VPTModel

BLOCK = 64  # weights that share a scale
BYTES = 0.5 + 4 / BLOCK  # of a weight
_BASE = "base_layer"  # as peft calls what an adapter stands beside


class Linear4bit(nn.Module):
    """A frozen linear layer, its weight in 4 bits. Nothing of the weight is in its state dict."""

    def __init__(self, weight: Tensor, bias: nn.Parameter | None) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.shape
        self.bias = bias
        self.packed: Tensor
        packed, self.scales = _quantize(weight)
        self.register_buffer("packed", packed, persistent=False)

    @property
    def weight(self) -> Tensor:
        """What the bits stand for, [out, in]."""
        return _dequantize(self.packed, self.scales)

    def forward(self, x: Tensor) -> Tensor:
        """As `nn.Linear`, under autocast too."""
        kind = x.device.type
        x = x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x
        product: Tensor = _Product.apply(x, self)
        return product


class _Product(torch.autograd.Function):
    """A product with a weight that is there in full only meanwhile, forward and backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear4bit) -> Tensor:
        ctx.layer = layer
        bias = None if layer.bias is None else layer.bias.to(x.dtype)
        return nn.functional.linear(x, layer.weight.to(x.dtype), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        [grad] = grads
        return grad @ ctx.layer.weight.to(grad.dtype), None


def base_weights(model: VPTModel) -> Iterator[tuple[str, nn.Linear]]:
    """The layers that adapters stand beside, each by the name of its weight in the model."""
    for name, module in model.named_modules():
        if name.endswith(f".{_BASE}") and isinstance(module, nn.Linear):
            yield f"{name}.weight", module


def quantize_base(model: VPTModel, weights: Mapping[str, Tensor], device: torch.device) -> None:
    """Put layers in 4 bits on `device` beside adapters, one after the other: the base is never whole.

    Args:
        model: the weights of these layers may be on the meta device, but tell their type.
        weights: those that checkpoints name, since they cannot hold them; each is read when it is asked for.
        device: where the model is.

    Raises ConfigError where a weight is not among them, or is trained.
    """
    for name, linear in [*base_weights(model)]:
        if linear.weight.requires_grad:
            raise ConfigError(f"optim.unfreeze trains {name}, which model.load_in_4bit keeps in 4 bits; leave one out")
        if name not in weights:
            raise ConfigError(
                f"model.load_in_4bit: no folder holds {name} as it is, since init_from trained it or it is installed "
                "with the package; type vpt export checkpoint=RUN to=FOLDER format=qwen, and model.path=FOLDER"
            )
        adapted: Any = model.get_submodule(name.removesuffix(f".{_BASE}.weight"))
        adapted.base_layer = Linear4bit(weights[name].to(device, linear.weight.dtype), linear.bias)


@torch.no_grad()
def round_base(model: VPTModel, dtype: str | None) -> None:
    """Give the weights beside adapters the values that their 4 bits stand for.

    `dtype`: what they were rounded to before (`model.frozen_dtype`), if anything.
    """
    for _, linear in base_weights(model):
        weight = linear.weight.to(getattr(torch, dtype)) if dtype else linear.weight
        linear.weight.copy_(_dequantize(*_quantize(weight)))


def _quantize(weight: Tensor) -> tuple[Tensor, Any]:
    packed, scales = _bnb().functional.quantize_4bit(weight.detach(), blocksize=BLOCK, quant_type="nf4")
    return packed, scales


def _dequantize(packed: Tensor, scales: Any) -> Tensor:
    weight: Tensor = _bnb().functional.dequantize_4bit(packed, scales)
    return weight


def _bnb() -> Any:
    return import_bitsandbytes("model.load_in_4bit")
