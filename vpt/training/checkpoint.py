"""Checkpoints: complete or absent, and without pickles.

    RUN/checkpoints/step_00000250/
        model.safetensors        weights, named as in VPTModel.state_dict(); a tied weight once
        optimizer.safetensors    NAME/exp_avg, NAME/exp_avg_sq, NAME/step; rng/torch
        state.json               step, W&B id, versions
        config.yaml              the whole configuration; this one is authoritative
        sizes/                   transformers' configurations of the parts: no other folder is needed to build them
        tokenizer/               as it has grown

A folder is written under another name and renamed when all of it is on the disk.
"""

import json
import os
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers
from omegaconf import OmegaConf
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

import vpt
from vpt.config import TrainConfig
from vpt.errors import CheckpointError, ConfigError
from vpt.freeze import freeze
from vpt.model import VPTModel
from vpt.sizes import Sizes
from vpt.weights import TensorFolder, fill, full, like, own_tensors
from vpt.world import World

STEP_FOLDER = "step_{:08d}"
WEIGHTS = "model.safetensors"


@dataclass
class Progress:
    """What a run needs besides tensors to go on: steps done, and the run's id at W&B."""

    step: int = 0
    wandb_id: str | None = None


def save(
    folder: Path, *, model: VPTModel, optimizer: torch.optim.Optimizer, progress: Progress, config: TrainConfig,
    tokenizer: PreTrainedTokenizerBase, keep: int, world: World,
) -> Path:  # fmt: skip
    """Write a checkpoint below `folder` and drop all but the last `keep`. Returns its path."""
    target = folder / STEP_FOLDER.format(progress.step)
    weights, moments = whole_tensors(model), _optimizer_tensors(optimizer)  # collectives where they are sharded
    if not world.main:
        world.wait()  # rank 0 has written
        return target
    draft = folder / f".writing_{target.name}"
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    save_weights(draft, model=model, config=config, tokenizer=tokenizer, tensors=weights)
    save_file(moments, draft / "optimizer.safetensors")
    versions = {"vpt": vpt.__version__, "torch": torch.__version__, "transformers": transformers.__version__}
    (draft / "state.json").write_text(json.dumps(asdict(progress) | {"versions": versions}, indent=1))
    for path in draft.rglob("*"):
        _sync(path)
    shutil.rmtree(target, ignore_errors=True)
    draft.rename(target)
    _sync(folder)
    for old in steps(folder)[:-keep]:
        shutil.rmtree(old)
    world.wait()
    return target


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def save_weights(
    folder: Path, *, model: VPTModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase,
    tensors: dict[str, Tensor] | None = None,
) -> None:  # fmt: skip
    """Write what `vpt.pretrained.load` reads: weights, sizes, configuration, tokenizer."""
    save_file(tensors or whole_tensors(model), folder / WEIGHTS, metadata={"format": "pt"})
    Sizes.of(model).save(folder / "sizes")
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    tokenizer.save_pretrained(folder / "tokenizer")


def whole_tensors(model: VPTModel) -> dict[str, Tensor]:
    """`own_tensors`, gathered where they are sharded."""
    return {name: full(tensor).contiguous() for name, tensor in own_tensors(model).items()}


def _optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    tensors = {"rng/torch": torch.get_rng_state()}
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                tensors[f"{name}/{key}"] = full(value.detach()).contiguous()
    return tensors


def steps(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(path for path in folder.glob("step_*") if path.is_dir())


def find(path: str | Path) -> Path:
    """The checkpoint that a user names: one of a run's step folders, its `checkpoints`, or the run (its last one)."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give a run (outputs/RUN_NAME) or one of its checkpoints")
    if (folder / WEIGHTS).is_file() and (folder / "config.yaml").is_file():
        return folder
    candidates = steps(folder / "checkpoints") or steps(folder)
    if not candidates:
        raise CheckpointError(f"{folder} holds no checkpoint (no step_* folder); train first, or give another folder")
    return candidates[-1]


def run_of(path: str | Path) -> Path:
    """The run that a checkpoint belongs to, or the folder itself where it belongs to none (an exported model)."""
    folder = Path(path)
    folder = folder.parent if folder.name.startswith("step_") else folder
    return folder.parent if folder.name == "checkpoints" else folder


def load_config(checkpoint: Path) -> TrainConfig:
    """The configuration inside a checkpoint."""
    try:
        return freeze(OmegaConf.load(checkpoint / "config.yaml"), TrainConfig)  # type: ignore[arg-type]
    except (OSError, ConfigError) as error:
        raise CheckpointError(f"{checkpoint} is no checkpoint of this version: {error}") from None


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a checkpoint, perception tokens included."""
    return AutoTokenizer.from_pretrained(checkpoint / "tokenizer", trust_remote_code=False)


def load_weights(checkpoint: Path, model: VPTModel) -> None:
    """Read the weights into `model`. Raises CheckpointError that lists missing and unexpected tensors."""
    fill(model, TensorFolder(checkpoint), where=checkpoint)


def load_progress(checkpoint: Path, optimizer: torch.optim.Optimizer) -> Progress:
    """Read the optimizer's state and the random state; return the step and the W&B id."""
    tensors = _read(checkpoint / "optimizer.safetensors")
    torch.set_rng_state(tensors.pop("rng/torch").cpu())
    for group in optimizer.param_groups:
        for name, parameter in zip(group["names"], group["params"], strict=True):
            keys = [key for key in (f"{name}/exp_avg", f"{name}/exp_avg_sq", f"{name}/step") if key in tensors]
            if keys:
                optimizer.state[parameter] = {
                    key.rpartition("/")[2]: tensors[key].to(parameter.device)
                    if key.endswith("/step")
                    else like(tensors[key], parameter)
                    for key in keys
                }
    state = json.loads((checkpoint / "state.json").read_text())
    return Progress(step=state["step"], wandb_id=state["wandb_id"])


def _read(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError) as error:
        raise CheckpointError(f"{path} cannot be read: {error}; resume from an older checkpoint") from None
