"""Folders of random weights at any size, in bfloat16 shards, as a hub has them: never a whole model in memory."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from vpt.checkpoint.tensors import unique_state_dict
from vpt.config.schema import TrainConfig
from vpt.models.build import build_bundle
from vpt.models.tiny_tokenizer import tiny_tokenizer

SHARD = 10**9  # bytes
_STD = 0.02


def write_folders(config: TrainConfig, to: Path) -> dict[str, Path]:
    """Write the base model and every re-encoder of a configuration, of the sizes that it has; key -> folder.

    The tokenizer is the tiny one: its ids lie within any table. `model.path` and `encoder.X.path` must be null.
    """
    tokenizer = tiny_tokenizer()
    bundle = build_bundle(config, tiny_tokenizer(), fetch=False)
    parts = {"model.path": ("base", bundle.model.qwen)}
    parts |= {f"encoder.{name}.path": (name, vision) for name, vision in bundle.model.visions.items()}
    for name, module in parts.values():
        _write(module, to / name)
    tokenizer.save_pretrained(to / "base")
    return {key: to / name for key, (name, _) in parts.items()}


def _write(module: Any, folder: Path) -> None:
    """One part, which is on the meta device: its configuration, and shards of random tensors."""
    folder.mkdir(parents=True)
    module.config.save_pretrained(folder)
    torch.manual_seed(0)
    own = unique_state_dict(module)
    weight_map: dict[str, str] = {}
    for number, names in enumerate(_shards({name: 2 * tensor.numel() for name, tensor in own.items()}), start=1):
        file = f"model-{number:05d}.safetensors"
        save_file({name: _drawn(name, own[name]) for name in names}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))


def _shards(sizes: Mapping[str, int]) -> list[list[str]]:
    """Names in groups of about `SHARD` bytes."""
    groups: list[list[str]] = [[]]
    held = 0
    for name, size in sizes.items():
        if held and held + size > SHARD:
            groups.append([])
            held = 0
        groups[-1].append(name)
        held += size
    return groups


def _drawn(name: str, like: Tensor) -> Tensor:
    """Vectors that scale are 1, biases 0, all else is normal."""
    if like.ndim == 1:
        return torch.full(like.shape, float(name.endswith("weight")), dtype=torch.bfloat16)
    return torch.randn(like.shape, dtype=torch.bfloat16) * _STD
