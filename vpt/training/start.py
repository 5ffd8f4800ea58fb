"""From a configuration to a model that its processes can train: built or taken up, whole or in slices.

Sharded models with weights to read are built as shapes (`meta`), sharded, and then filled: every process reads its
slices, one tensor at a time, so that the model is never whole on one of them. That goes for a folder of Qwen's, a
released checkpoint and one of our own. Random weights, and re-encoders that come from folders of their own, are small
enough to be built whole first.
"""

from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from vpt.build import ModelBundle, build_model
from vpt.compiling import compile_layers
from vpt.config import TrainConfig
from vpt.flops import FlopMeter
from vpt.lora import is_adapter, plain_name, reset_adapters
from vpt.model import VPTModel
from vpt.pretrained import build_from_checkpoint
from vpt.released import UpstreamCheckpoint
from vpt.training.optimizer import set_trainable
from vpt.training.resume import resolve_init_from, warm_start
from vpt.training.strategy import SHARDED, Strategy, build_strategy, choose_strategy
from vpt.weights import LazyStateDict, check_state_dict, shard_like, unique_state_dict
from vpt.world import World

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each token


def build_training(
    config: TrainConfig, found: Path | None, world: World, device: torch.device
) -> tuple[ModelBundle, Strategy, FlopMeter]:  # fmt: skip
    """Build a run's model, and shard or copy it as configured. That of the checkpoint `found` is still to be read.

    With them comes a meter that has seen the model whole.

    Raises:
        UserError: for whatever cannot run.
    """
    start = resolve_init_from(config.init_from) if config.init_from and not found else None
    kind = config.strategy.kind
    readable = found is not None or config.model.path is not None
    bare = readable and (kind in SHARDED or (kind == "auto" and world.size > 1))
    parts = _parts(config, found, bare=bare)
    if kind == "auto":
        kind = choose_strategy(parts.model, world, device)
        if bare and kind not in SHARDED:  # small enough to be whole
            bare, parts = False, _parts(config, found, bare=False)
    model = parts.model
    if not bare and not found:
        reset_adapters(model.language, seed=config.seed)
    meter = FlopMeter(model)
    chosen = replace(config.strategy, kind=kind)
    if config.training.compile:
        compile_layers(model)
    strategy = build_strategy(chosen, model, world, device, precision=config.training.precision)
    if bare:
        materialize(model, device)
    if bare and not found:
        load_base_weights(model, str(config.model.path))
        reset_adapters(model.language, seed=config.seed)
    if start is not None:
        warm_start(model, start, without=config.init_except, quiet=not world.is_main)
    return parts, strategy, meter


def _parts(config: TrainConfig, found: Path | None, *, bare: bool) -> ModelBundle:
    torch.manual_seed(config.seed)
    parts = build_from_checkpoint(found, config, bare=bare) if found else build_model(config, bare=bare)
    set_trainable(parts.model, config.optim, tower_pretrained=config.model.path is not None)
    return parts


def materialize(model: VPTModel, device: torch.device) -> None:
    """Give tensors that are only shapes memory on `device`, without values, and buffers that no file holds theirs."""
    visions = [vision for name in model.encoders if (vision := model.encoder(name).vision) is not None]
    bare = [
        (part, module)
        for part in (model.qwen, *visions)
        for module in part.modules()
        if any(buffer.is_meta for buffer in module.buffers(recurse=False))
    ]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for part, module in bare:
        part._init_weights(module)  # rotary frequencies, numbers of positions


@torch.no_grad()
def load_base_weights(model: VPTModel, path: str) -> None:
    """Read weights into a model that may be sharded: all of it from a released checkpoint, Qwen's part from a folder of
    Qwen's or the hub. Adapters are left alone.

    Rows by which the vocabulary has grown get the mean of the stored ones, as in `vpt.tokens.grow_embedding`.

    Raises:
        CheckpointError: lists tensors that are missing or of another size, and those of a released checkpoint that
            belong to no part.
    """
    released = UpstreamCheckpoint.at(path)
    tensors = released.tensors if released else LazyStateDict(_local(path))
    held = (
        unique_state_dict(model)
        if released
        else {f"qwen.{name}": t for name, t in unique_state_dict(model.qwen).items()}
    )
    own = {plain_name(name): tensor for name, tensor in held.items() if not is_adapter(name)}
    if released:
        names = released.names(tied=model.qwen.config.tie_word_embeddings)
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
