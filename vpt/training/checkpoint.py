"""Checkpoints: complete or absent, sharded, and without pickles.

    RUN/checkpoints/step_00000250/
        model.safetensors        weights, named as in VPTModel.state_dict(); a tied weight once
        optimizer.safetensors    NAME/exp_avg, NAME/exp_avg_sq, NAME/step
        state.json               step, W&B id, best score, versions
        config.yaml              the whole configuration; this one is authoritative
        sizes/                   transformers' configurations of the parts: no other folder is needed to build them
        tokenizer/               as it has grown
        SHA256SUMS               of all these files
        complete                 empty, written last
    RUN/checkpoints/latest, best     links to such folders

What n processes saved is in files of their own, `model-00001-of-0000n.safetensors` and so on; any number of processes
reads it. `torch.distributed.checkpoint` writes and reads the tensors, in safetensors: its other format describes them
in a pickle, and a pickle runs whatever its author wants. No random state is kept: see `vpt.training.chance`.
"""

import json
import warnings
from collections.abc import Container, Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from omegaconf import OmegaConf
from safetensors.torch import save_file
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from vpt.config import TrainConfig
from vpt.errors import CheckpointError, ConfigError, wrap_read_errors
from vpt.freeze import resolve_config
from vpt.model import VPTModel
from vpt.seal import check_regular_files, write_checksums
from vpt.sizes import Architecture
from vpt.values import read_values
from vpt.weights import LazyStateDict, check_state_dict, load_state_dict, unique_state_dict

STEP_FOLDER = "step_{:08d}"
WEIGHTS = "model.safetensors"
COMPLETE = "complete"  # the marker inside a checkpoint
LATEST, BEST = "latest", "best"  # links beside them


@dataclass
class TrainState:
    """What a run needs besides tensors to go on: steps done, the run's id at W&B, its best score so far and when;
    records left out so far, steps lost to a gradient that is not finite, and how many of those were the last ones.
    """

    step: int = 0
    wandb_id: str | None = None
    best: float | None = None
    best_step: int | None = None
    skipped: int = 0
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0

    def is_best(self, metrics: Mapping[str, float], *, by: str | None) -> bool:
        """Whether a metric is better now than ever before, which is remembered; of a loss, the lower the better.

        Raises:
            ConfigError: where there is no such metric.
        """
        if by is None:
            return False
        if by not in metrics:
            raise ConfigError(f"training.best={by} is not a metric of the evaluation: {', '.join(metrics)}")
        sign = -1 if by.endswith("loss") else 1
        if self.best is not None and sign * metrics[by] <= sign * self.best:
            return False
        self.best, self.best_step = metrics[by], self.step
        return True


def save_weights(
    folder: Path, *, model: VPTModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:  # fmt: skip
    """Write what `vpt.pretrained.load` reads: weights, sizes, configuration, tokenizer."""
    tensors = {name: tensor.contiguous() for name, tensor in unique_state_dict(model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_metadata(folder, model=model, config=config, tokenizer=tokenizer)
    write_checksums(folder)


def save_metadata(
    folder: Path, *, model: VPTModel, config: TrainConfig, tokenizer: PreTrainedTokenizerBase
) -> None:  # fmt: skip
    """Write what is needed besides weights to build a model again."""
    Architecture.of(model).save(folder / "sizes")
    OmegaConf.save(OmegaConf.structured(config), folder / "config.yaml")
    tokenizer.save_pretrained(folder / "tokenizer")


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name, as the processes hold it; empty before the first step."""
    return {
        f"{name}/{key}": value.detach()
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
    }


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints below `folder`, oldest first."""
    return sorted(path.parent for path in folder.glob(f"step_*/{COMPLETE}"))


def find_checkpoint(path: str | Path) -> Path:
    """The checkpoint that a user names: one of a run's step folders, its `checkpoints`, or the run (its last one)."""
    folder = Path(path)
    if not folder.is_dir():
        raise CheckpointError(f"{folder} does not exist; give a run (outputs/RUN_NAME) or one of its checkpoints")
    missing = [name for name in ("model*.safetensors", "config.yaml") if not any(folder.glob(name))]
    if not missing:
        return check_regular_files(folder)
    if (folder / COMPLETE).exists() or (folder / "sizes").exists():
        raise CheckpointError(f"{folder} lacks {' and '.join(missing)}; copy it again, or give an older checkpoint")
    candidates = list_checkpoints(folder / "checkpoints") or list_checkpoints(folder)
    if not candidates:
        raise CheckpointError(f"{folder} holds no checkpoint (no step_* folder); train first, or give another folder")
    return check_regular_files(candidates[-1])


def run_folder(path: str | Path) -> Path:
    """The run that a checkpoint belongs to, or the folder itself where it belongs to none (an exported model)."""
    folder = Path(path)
    folder = folder.parent if folder.name.startswith("step_") else folder
    return folder.parent if folder.name == "checkpoints" else folder


def load_config(checkpoint: Path) -> TrainConfig:
    """The configuration inside a checkpoint."""
    with wrap_read_errors(
        checkpoint / "config.yaml", "use the version of vpt that wrote it, or copy the checkpoint again"
    ):
        return resolve_config(read_values(checkpoint / "config.yaml"), TrainConfig)


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a checkpoint, perception tokens included."""
    with wrap_read_errors(checkpoint / "tokenizer", "copy the checkpoint again, or use an older one"):
        if not (checkpoint / "tokenizer").is_dir():
            raise ValueError("there is no such folder")
        return Qwen2Tokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True)


def load_weights(checkpoint: Path, model: VPTModel) -> None:
    """Read the weights into `model`. Raises CheckpointError that lists missing and unexpected tensors."""
    load_state_dict(model, LazyStateDict(checkpoint), where=checkpoint)


def restore(checkpoint: Path, model: VPTModel, optimizer: torch.optim.Optimizer) -> TrainState:
    """Read weights and the optimizer's state in place, each process its part; return the rest.

    Raises:
        CheckpointError: where the checkpoint is broken, or of another model.
    """
    with wrap_read_errors(checkpoint, "resume from an older checkpoint"):
        LazyStateDict(checkpoint, sorted(checkpoint.glob("optimizer*.safetensors")))  # its headers make sense
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored = {name: entry.size for name, entry in reader.read_metadata().state_dict_metadata.items()}  # type: ignore[union-attr]
        tensors = unique_state_dict(model)
        check_state_dict({name: stored[name] for name in stored if "/" not in name}, tensors, where=checkpoint)
        tensors |= _begin_state(optimizer, stored)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            try:
                dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
            except CheckpointException as error:  # no Exception; it holds one of each process that failed
                raise next(iter(error.failures.values()))[0] from None
        progress = _read_progress(checkpoint)
    return progress


def _read_progress(checkpoint: Path) -> TrainState:
    """Where a run stood. Raises CheckpointError where that is nonsense: it decides which records come next."""
    with wrap_read_errors(checkpoint / "state.json", "resume from an older checkpoint"):
        state = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        known = {item.name for item in fields(TrainState)} & state.keys()
        for key in known:
            hint, value = get_type_hints(TrainState)[key], state[key]
            if isinstance(value, bool) or not isinstance(value, hint):
                raise ValueError(f"{key}={value!r} is not of type {getattr(hint, '__name__', hint)}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{key}={value} is negative")
        if checkpoint.name != STEP_FOLDER.format(state["step"]):
            raise ValueError(f"it is of step {state['step']}, the folder is {checkpoint.name}")
        return TrainState(**{key: state[key] for key in known})


def _begin_state(optimizer: torch.optim.Optimizer, stored: Container[str]) -> dict[str, Tensor]:
    """Give the optimizer the state tensors that a checkpoint holds, for it to be read into."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        blank = {
            "step": torch.zeros((), device=parameter.device),
            "exp_avg": torch.zeros_like(parameter),
            "exp_avg_sq": torch.zeros_like(parameter),
        }
        state = {key: value for key, value in blank.items() if f"{name}/{key}" in stored}
        if 0 < len(state) < len(blank):
            raise ValueError(f"of {name}'s moments it holds {', '.join(state)} alone")
        if state:
            optimizer.state[parameter] = state
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors
