"""Give a model on the meta device its memory and its weights, whole or each process its slices.

base model      read tensor by tensor from a folder of Qwen's or an upstream checkpoint, or drawn at random
re-encoders     from that upstream checkpoint, else built whole, by transformers, and copied
adapters        drawn from the seed alone
"""

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from torch import Tensor, nn

from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.distributed.dtensor import shard_like
from vpt.models.build import ModelBundle, build_encoder
from vpt.models.lora import LORA_A, LORA_B, is_adapter, plain_name
from vpt.models.qwen import base_sizes, build_qwen, from_pretrained_or_hub
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each token


def materialize(model: VPTModel, device: torch.device | str) -> None:
    """Give tensors on the meta device memory on `device`, without values, and buffers that no file holds theirs."""
    unset = [
        (part, module)
        for part in (model.qwen, *model.visions.values())
        for module in part.modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    model.qwen.tie_weights()
    for part, module in unset:
        part._init_weights(module)  # rotary frequencies, numbers of positions


@dataclass(frozen=True)
class BaseWeights:
    """Tensors of a base model, or of an upstream checkpoint.

    Attributes:
        tensors: by stored name.
        names: our name -> stored name.
        prefix: what the names of the tensors that they fill begin with; empty where they fill the re-encoders too.
    """

    tensors: Mapping[str, Tensor]
    names: Mapping[str, str]
    prefix: str

    @classmethod
    def find(cls, model: VPTModel, path: str) -> "BaseWeights":
        """Open the weights of an upstream checkpoint, of a folder of Qwen's, or of a hub.

        Raises:
            CheckpointError: lists tensors that are missing or of another size, and those of an upstream checkpoint
                that belong to no part.
        """
        tied, upstream = model.qwen.config.tie_word_embeddings, UpstreamCheckpoint.at(path)
        tensors = upstream.tensors if upstream else LazyStateDict(from_pretrained_or_hub(path, "model.path", _local))
        if upstream:
            names = upstream.names(tied=tied)
        else:
            known = {plain_name(name) for name in model.state_dict()} - ({"qwen.lm_head.weight"} if tied else set())
            names = {ours: name for name in tensors if (ours := f"qwen.{_own_name(name)}") in known}
        found = cls(tensors, names, prefix="" if upstream else "qwen.")
        own, shapes = dict(found._targets(model)), {ours: list(tensors.shapes[name]) for ours, name in names.items()}
        for name in own.keys() & shapes.keys():
            if name.endswith(_TABLES):
                shapes[name][0] = max(shapes[name][0], len(own[name]))
        check_state_dict(shapes, own, where=tensors.folder, names=names)
        return found

    @classmethod
    def draw(cls, bundle: ModelBundle) -> "BaseWeights":
        """Random ones, whole, by transformers' own initialisers; those of the base model alone."""
        settings = bundle.config.model
        tensors = build_qwen(settings, base_sizes(settings, bundle.model.vocabulary)).state_dict()
        return cls(tensors, {f"qwen.{name}": name for name in tensors}, prefix="qwen.")

    def _targets(self, model: VPTModel) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are filled, adapters apart, each by its name in a model without adapters."""
        for name, tensor in unique_state_dict(model).items():
            if name.startswith(self.prefix) and not is_adapter(name):
                yield plain_name(name), tensor

    @torch.no_grad()
    def load(self, model: VPTModel) -> None:
        """Fill the model, which may be sharded. Rows by which the vocabulary has grown get the mean of the others."""
        for name, target in self._targets(model):
            tensor = self.tensors[self.names[name]]
            if name.endswith(_TABLES):
                tensor = _extend_vocab(tensor.to(target.dtype), len(target))
            target.copy_(shard_like(tensor, target))


def initialize(bundle: ModelBundle, stored: BaseWeights | None) -> None:
    """Fill a new model that has memory: from what is stored, and all else from the global random state and the seed."""
    model, config = bundle.model, bundle.config
    (stored or BaseWeights.draw(bundle)).load(model)
    if stored is None or stored.prefix:
        for name, settings in config.encoder.items():
            sizes, transform = settings.sizes[settings.size].config, bundle.processor.transforms[VISION_TOWER]
            _copy(build_encoder(config, name, model.qwen, transform, sizes=sizes, pretrained=True), model.encoder(name))
    reset_adapters(model.language, seed=config.seed)


@torch.no_grad()
def _copy(whole: nn.Module, own: nn.Module) -> None:
    """Copy the tensors of a module into another like it, which may be sharded."""
    tensors: dict[str, Any] = whole.state_dict()
    for name, target in own.state_dict(keep_vars=True).items():
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


def _local(path: str | None) -> Path:
    folder = Path(str(path))
    return folder if folder.is_dir() else Path(snapshot_download(str(path), allow_patterns=["*.safetensors", "*.json"]))


def _own_name(stored: str) -> str:
    """transformers' present name of a tensor in a Qwen2-VL or Qwen2.5-VL folder; older ones lack `model.` or more."""
    if stored.startswith("visual."):
        return f"model.{stored}"
    if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
        return stored.replace("model.", "model.language_model.", 1)
    return stored


def _extend_vocab(table: Tensor, rows: int) -> Tensor:
    if len(table) >= rows:
        return table
    return torch.cat([table, table.mean(dim=0).expand(rows - len(table), -1)])
