"""From a configuration to a model that its processes can train: built or taken up, whole or in slices.

Sharded models with weights to read are built as shapes (`meta`), sharded, and then filled: every process reads its
slices, one tensor at a time, so that the model is never whole on one of them. Random weights, re-encoders and released
checkpoints are small or rare enough to be built whole first.
"""

from dataclasses import replace
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from torch import Tensor

from vpt.build import Parts, build
from vpt.compiling import compile_layers
from vpt.config import TrainConfig
from vpt.errors import CheckpointError
from vpt.flops import FlopMeter
from vpt.lora import is_adapter, plain_name, reset_adapters
from vpt.model import VPTModel
from vpt.pretrained import rebuild
from vpt.released import ReleasedCheckpoint
from vpt.training.optimizer import choose_trained
from vpt.training.resume import starting_point, warm_start
from vpt.training.strategy import SHARDED, Strategy, automatic, build_strategy
from vpt.weights import TensorFolder, like, own_tensors
from vpt.world import World


def begin(
    config: TrainConfig, found: Path | None, world: World, device: torch.device
) -> tuple[Parts, Strategy, FlopMeter]:  # fmt: skip
    """Build a run's model, and shard or copy it as configured. That of the checkpoint `found` is still to be read.

    With them comes a meter that has seen the model whole.

    Raises:
        UserError: for whatever cannot run.
    """
    start = starting_point(config.init_from) if config.init_from and not found else None
    readable = found is not None or (config.model.path and not ReleasedCheckpoint.at(config.model.path))
    kind = config.strategy.kind
    bare = bool(readable) and (kind in SHARDED or (kind == "auto" and world.size > 1))
    parts = _parts(config, found, bare=bare)
    if kind == "auto":
        kind = automatic(parts.model, world, device)
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
        materialise(model, device)
    if bare and not found:
        read_base(model, str(config.model.path))
        reset_adapters(model.language, seed=config.seed)
    if start is not None:
        warm_start(model, start, without=config.init_except, quiet=not world.main)
    return parts, strategy, meter


def _parts(config: TrainConfig, found: Path | None, *, bare: bool) -> Parts:
    torch.manual_seed(config.seed)
    parts = rebuild(found, config, bare=bare) if found else build(config, bare=bare)
    choose_trained(parts.model, config.optim, tower_pretrained=config.model.path is not None)
    return parts


def materialise(model: VPTModel, device: torch.device) -> None:
    """Give tensors that are only shapes memory on `device`, without values, and buffers that no file holds theirs."""
    bare = [module for module in model.modules() if any(b.is_meta for b in module.buffers(recurse=False))]
    model._apply(lambda tensor: torch.empty_like(tensor, device=device) if tensor.is_meta else tensor)
    for module in bare:
        model.qwen._init_weights(module)  # rotary frequencies


@torch.no_grad()
def read_base(model: VPTModel, path: str) -> None:
    """Read Qwen's weights from a folder or the hub into a model that may be sharded; adapters are left alone.

    Rows by which the vocabulary has grown get the mean of the stored ones, as in `vpt.tokens.grow_embedding`.

    Raises:
        CheckpointError: where a tensor is missing or of another size.
    """
    folder = Path(path)
    if not folder.is_dir():
        folder = Path(snapshot_download(path, allow_patterns=["*.safetensors", "*.json"]))
    tensors = TensorFolder(folder)
    stored = {_own_name(name): name for name in tensors}
    own = {name: tensor for name, tensor in own_tensors(model.qwen).items() if not is_adapter(name)}
    missing = [name for name in own if plain_name(name) not in stored]
    if missing:
        raise CheckpointError(f"{folder} lacks {', '.join(missing)}; download it again")
    for name, target in own.items():
        tensor = tensors[stored[plain_name(name)]]
        if name.endswith(("embed_tokens.weight", "lm_head.weight")):
            tensor = _grown(tensor.to(target.dtype), len(target))
        if tensor.shape != target.shape:
            raise CheckpointError(f"{folder}: {name} is {list(tensor.shape)} instead of {list(target.shape)}")
        target.copy_(like(tensor, target))


def _own_name(stored: str) -> str:
    """transformers' present name of a tensor in a Qwen2-VL or Qwen2.5-VL folder; older ones lack `model.` or more."""
    if stored.startswith("visual."):
        return f"model.{stored}"
    if stored.startswith("model.") and not stored.startswith(("model.visual.", "model.language_model.")):
        return stored.replace("model.", "model.language_model.", 1)
    return stored


def _grown(table: Tensor, rows: int) -> Tensor:
    if len(table) >= rows:
        return table
    return torch.cat([table, table.mean(dim=0).expand(rows - len(table), -1)])
