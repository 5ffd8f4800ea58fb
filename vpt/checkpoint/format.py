"""Checkpoints: complete or absent, sharded, and without pickles.

    RUN/checkpoints/step_00000250/
        model.safetensors        weights, named as in VPTModel.state_dict(); a tied weight once
        frozen_weights.json      where the others are: vpt.checkpoint.frozen_weights
        optimizer.safetensors    NAME/exp_avg, NAME/exp_avg_sq, NAME/step; in 8 bits NAME/state1, ...
        state.json               step, W&B id, best score, versions
        config.yaml              the whole configuration; this one is authoritative
        sizes/                   transformers' configurations of the parts
        tokenizer/               as it has grown
        SHA256SUMS               of all these files
        complete                 empty, written last
    RUN/checkpoints/latest, best     links to such folders

What n processes saved is in files of their own, `model-00001-of-0000n.safetensors` and so on; any number of processes
reads it. `torch.distributed.checkpoint` writes and reads the tensors, in safetensors: its other format describes them
in a pickle, and a pickle runs whatever its author wants. No random state is kept: see `vpt.training.seed`.
"""

from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from safetensors.torch import save_file
from transformers import PreTrainedTokenizerBase, Qwen2Tokenizer

from vpt.checkpoint.architecture_files import save_architecture
from vpt.checkpoint.checksums import check_regular_files, write_checksums
from vpt.checkpoint.tensors import unique_state_dict
from vpt.config.former_names import with_present_names
from vpt.config.plain_yaml import read_values
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.errors import CheckpointError, wrap_read_errors
from vpt.models.architecture import Architecture
from vpt.models.build import ModelBundle

STEP_FOLDER = "step_{:08d}"
WEIGHTS = "model.safetensors"
COMPLETE = "complete"  # the marker inside a checkpoint
LATEST, BEST = "latest", "best"  # links beside them


def save_weights(folder: Path, bundle: ModelBundle) -> None:
    """Write a checkpoint without optimizer for `load_pretrained`: all weights, sizes, configuration, tokenizer."""
    tensors = {name: tensor.contiguous() for name, tensor in unique_state_dict(bundle.model).items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    save_metadata(folder, bundle)
    write_checksums(folder)


def save_metadata(folder: Path, bundle: ModelBundle) -> None:
    """Write sizes, configuration and tokenizer, of which a model is built again."""
    save_architecture(Architecture.of(bundle.model), folder / "sizes")
    OmegaConf.save(OmegaConf.structured(bundle.config), folder / "config.yaml")
    bundle.tokenizer.save_pretrained(folder / "tokenizer")


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
        values: Any = OmegaConf.to_container(read_values(checkpoint / "config.yaml"))
        return resolve_config(OmegaConf.create(with_present_names(values)), TrainConfig)


def load_tokenizer(checkpoint: Path) -> PreTrainedTokenizerBase:
    """The tokenizer inside a checkpoint, perception tokens included."""
    with wrap_read_errors(checkpoint / "tokenizer", "copy the checkpoint again, or use an older one"):
        if not (checkpoint / "tokenizer").is_dir():
            raise ValueError("there is no such folder")
        return Qwen2Tokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True)
