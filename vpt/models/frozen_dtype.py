"""`model.frozen_dtype`: frozen matrices are stored as bfloat16 while what is trained stays as it is."""

import torch
from torch import nn

_PRODUCTS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)


def cast_frozen(model: nn.Module, dtype: str | None, *, all_frozen: bool = False) -> None:
    """Store frozen weights of linear layers and convolutions as `dtype`, in place; nothing where it is None.

    These are what autocast rounds for every product, so a run under bf16 autocast computes the same to the last bit.
    All else stays: norms, tables of tokens (also where the head is tied to them) and of positions, which go into sums,
    and buffers.

    Args:
        model: best on the meta device, so that nothing is ever stored as it was; its `requires_grad` are set.
        dtype: `bfloat16` or None.
        all_frozen: nothing will be trained, whatever `requires_grad` says.
    """
    if dtype is None:
        return
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    for module in model.modules():
        for parameter in module.parameters(recurse=False) if isinstance(module, _PRODUCTS) else ():
            if (all_frozen or not parameter.requires_grad) and id(parameter) not in tables:
                parameter.data = parameter.data.to(getattr(torch, dtype))
