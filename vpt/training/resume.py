"""Taking up a run, and starting one from another's weights."""

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from vpt.config import TrainConfig
from vpt.errors import CheckpointError
from vpt.model import VPTModel
from vpt.training import checkpoint

# Keys that may change between two commands of one run, because they change no result
_FREE = (
    "output_dir", "device", "init_from", "tracking", "generation", "data.root", "data.workers", "data.cache_mb",
    "data.limit", "training.micro_batch_size", "training.log_every", "training.eval_every", "training.eval_rows",
    "training.final_questions", "training.checkpoint_every", "training.keep", "model.inner_forward",
    "model.activation_checkpointing", "model.token_ids", "model.path",
)  # fmt: skip


def compare(found: Path, config: TrainConfig) -> None:
    """Raise CheckpointError with the difference where a checkpoint belongs to another configuration."""
    before, now = (dict(_leaves(asdict(tree))) for tree in (checkpoint.load_config(found), config))
    changed = [
        f"  {key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and not key.startswith(_FREE)
    ]
    if changed:
        raise CheckpointError(
            f"{found} was trained with another configuration:\n" + "\n".join(changed) + "\n"
            "take these changes back to go on, or start a new run with run_name=OTHER_NAME"
        )


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def warm_start(model: VPTModel, found: Path) -> None:
    """Take every tensor of a checkpoint that the model has too; what the model has alone stays as it was built.

    Raises CheckpointError where a tensor is of another size, or where nothing fits.
    """
    tensors, own = load_file(found / "model.safetensors"), model.state_dict()
    shared = tensors.keys() & own.keys()
    wrong = checkpoint.wrong_shapes({name: tensors[name] for name in shared}, own)
    if wrong or not shared:
        raise CheckpointError(f"init_from={found} does not fit the model: {'; '.join(wrong) or 'no tensor in common'}")
    model.load_state_dict(tensors, strict=False)
    left = sorted({name.rpartition(".")[0] for name in own.keys() - tensors.keys() if "lm_head" not in name})
    print(f"  starts from {found}" + (f"; newly built: {', '.join(left)}" if left else ""))
