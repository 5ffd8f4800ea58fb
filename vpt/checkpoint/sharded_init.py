"""Give a model that was built on the meta device its memory, and read the weights of the base model into it."""

from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.distributed.dtensor import shard_like
from vpt.models.lora import is_adapter, plain_name
from vpt.models.vpt import VPTModel

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each token


def materialize(model: VPTModel, device: torch.device) -> None:
    """Give tensors that are only shapes memory on `device`, without values, and buffers that no file holds theirs."""
    visions = [vision for name in model.encoders if (vision := model.encoder(name).vision) is not None]
    on_meta = [
        (part, module)
        for part in (model.qwen, *visions)
        for module in part.modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for part, module in on_meta:
        part._init_weights(module)  # rotary frequencies, numbers of positions


@torch.no_grad()
def load_base_weights(model: VPTModel, path: str) -> None:
    """Read weights into a model that may be sharded: all of it from an upstream checkpoint, Qwen's part from a folder
    of Qwen's or the hub. Adapters are left alone.

    Rows by which the vocabulary has grown get the mean of the stored ones, as in `vpt.models.qwen`. Raises
    CheckpointError with the tensors that are missing, of another size, or upstream's of no known part.
    """
    upstream = UpstreamCheckpoint.at(path)
    tensors = upstream.tensors if upstream else LazyStateDict(_local(path))
    prefix, part = ("", model) if upstream else ("qwen.", model.qwen)
    held = {f"{prefix}{name}": tensor for name, tensor in unique_state_dict(part).items()}
    own = {plain_name(name): tensor for name, tensor in held.items() if not is_adapter(name)}
    if upstream:
        names = upstream.names(tied=model.qwen.config.tie_word_embeddings)
    else:
        names = {ours: name for name in tensors if (ours := f"qwen.{_own_name(name)}") in own}
    shapes = {ours: list(tensors.shapes[name]) for ours, name in names.items()}
    for name in own.keys() & shapes.keys():
        if name.endswith(_TABLES):
            shapes[name][0] = max(shapes[name][0], len(own[name]))
    check_state_dict(shapes, own, where=tensors.folder, names=names)
    for name, target in own.items():
        tensor = tensors[names[name]]
        if name.endswith(_TABLES):
            tensor = _extend_vocab(tensor.to(target.dtype), len(target))
        target.copy_(shard_like(tensor, target))


def _local(path: str) -> Path:
    folder = Path(path)
    return folder if folder.is_dir() else Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))


def _own_name(stored: str) -> str:
    """transformers' present name of a tensor in a Qwen2-VL or Qwen2.5-VL folder; older folders lack a prefix."""
    if stored.startswith("visual."):
        return f"model.{stored}"
    if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
        return stored.replace("model.", "model.language_model.", 1)
    return stored


def _extend_vocab(table: Tensor, rows: int) -> Tensor:
    if len(table) >= rows:
        return table
    return torch.cat([table, table.mean(dim=0).expand(rows - len(table), -1)])
