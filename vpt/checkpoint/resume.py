"""Checks before a run is resumed, and warm starts from another run's weights."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vpt.checkpoint.checksums import find_damage, verify
from vpt.checkpoint.format import STEP_FOLDER, find_checkpoint, list_checkpoints, load_config
from vpt.checkpoint.frozen_weights import CheckpointTensors, FrozenWeights
from vpt.checkpoint.tensors import shape_mismatches
from vpt.config.rl import RLConfig
from vpt.config.schema import EncoderConfig, TrainConfig
from vpt.config.weight_folder import weight_paths
from vpt.distributed.dtensor import shard_like
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError, listed
from vpt.models.lora import has_adapters, merged, plain_name
from vpt.models.vpt import VPTModel

# Keys that may change between two commands of one run, because they change no result
MAY_CHANGE = (
    "output_dir", "device", "threads", "pictures", "strategy", "init_", "tracking", "generation", "data.root",
    "data.workers", "data.image_cache_mb", "data.feature_cache", "data.limit", "training.micro_batch_size",
    "training.log_every", "training.eval_every", "training.eval_rows", "training.final_eval_questions",
    "training.checkpoint_every", "training.keep_checkpoints", "training.best_metric", "training.save_frozen_weights",
    "model.inner_forward", "model.activation_checkpointing", "model.token_ids", "model.path",
)  # fmt: skip


def latest_checkpoint(checkpoints: Path, world: World) -> Path | None:
    """The last checkpoint in a folder as rank 0 sees it: file systems may show other ranks an older state."""
    last = max((int(path.name.rpartition("_")[2]) for path in list_checkpoints(checkpoints)), default=-1)
    last = world.broadcast(last)
    return checkpoints / STEP_FOLDER.format(last) if last >= 0 else None


def verify_together(found: Path, config: TrainConfig, world: World) -> None:
    """Raise CheckpointError, on every process, where a file of the checkpoint, or one that it names, is damaged."""
    rank, ranks = world.rank, world.size
    frozen = FrozenWeights.named_by(found, weight_paths(config), strict=True)
    damage = find_damage(found, rank=rank, ranks=ranks) or frozen.mismatch(found, rank=rank, ranks=ranks)
    for text in filter(None, world.all_gather_text(damage)):
        raise CheckpointError(text)


def check_same_config(found: Path, config: TrainConfig) -> None:
    """Raise CheckpointError with the difference where a checkpoint belongs to another configuration.

    What `config` leaves open, and the files beside the base model once decided, is filled in as it was recorded.
    """
    recorded = load_config(found)
    for own, its in ((config.data.image, recorded.data.image), (config.data.video, recorded.data.video)):
        for item in fields(own):
            if getattr(own, item.name) is None:
                setattr(own, item.name, getattr(its, item.name))
    stops = config.generation.stop
    config.generation.stop = [*stops, *(stop for stop in recorded.generation.stop if stop not in stops)]
    before, now = (dict(_leaves(asdict(tree))) for tree in (recorded, config))
    irrelevant, relevant = [*MAY_CHANGE, *_other_sizes(config.encoder, recorded.encoder)], [*_of_rollouts(config.rl)]
    if recorded.rl.algorithm == config.rl.algorithm == "none":
        irrelevant.append("rl.")
    changed = [
        f"  {key}: {before.get(key)} -> {now.get(key)}"
        for key in sorted(before.keys() | now.keys())
        if before.get(key) != now.get(key) and (key in relevant or not key.startswith(tuple(irrelevant)))
    ]
    if changed:
        raise CheckpointError(
            f"{found} was trained with another configuration:\n" + "\n".join(changed) + "\n"
            "take these changes back to go on, or start a new run with run_name=OTHER_NAME"
        )


def _of_rollouts(rl: RLConfig) -> Iterator[str]:
    """Keys among MAY_CHANGE that change results of reward learning: limits of rollouts, and the reference policy."""
    if rl.algorithm == "none":
        return
    names = ("action", "crop_margin", "max_actions", "max_new_tokens", "stop")
    yield from (f"generation.{name}" for name in names)
    if rl.beta:
        yield from ("init_from", "init_exclude")


def _other_sizes(*trees: Mapping[str, EncoderConfig]) -> Iterator[str]:
    """Keys of the sizes that encoders do not have, and of where their weights once came from."""
    for name in set.intersection(*({name for name in tree if tree[name].weights} for tree in trees)):
        yield f"encoder.{name}.path"
    for name, encoder in [pair for tree in trees for pair in tree.items()]:
        yield f"encoder.{name}.sizes.{encoder.size}.weights"
        yield from (f"encoder.{name}.sizes.{size}." for size in encoder.sizes if size != encoder.size)


def _leaves(tree: dict[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from _leaves(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


@dataclass(frozen=True)
class WarmStart:
    """A checkpoint whose weights another run starts from.

    Attributes:
        tensors: all of it, those that it names included.
        exclude: patterns of names that are not taken.
    """

    checkpoint: Path
    tensors: CheckpointTensors
    exclude: Sequence[str] = ()

    @classmethod
    def of(cls, config: TrainConfig) -> "WarmStart":
        """That of `init_from`. Raises CheckpointError where there is none."""
        try:
            found = find_checkpoint(str(config.init_from))
            verify(found)
            if load_config(found).model.load_in_4bit and not config.model.load_in_4bit:
                raise CheckpointError(
                    "its adapters were trained beside 4 bits; type model.load_in_4bit=true, or vpt export "
                    f"checkpoint={config.init_from} to=FOLDER and init_from=FOLDER"
                )
            frozen = FrozenWeights.named_by(found, weight_paths(config)).check(found)
            return cls(found, CheckpointTensors(found, frozen), config.init_exclude)
        except CheckpointError as error:
            raise CheckpointError(
                f"init_from={config.init_from}: {error}. Train that stage first; init_from=OTHER_RUN starts from "
                "another, init_from=null from the base model"
            ) from None

    def load(self, model: VPTModel, frozen: FrozenWeights, *, quiet: bool = False) -> FrozenWeights:
        """Copy every tensor that the model has too, but those that both name in the same place.

        Adapters are merged where the model has none; where it has some, a checkpoint without gives it its base.

        Args:
            model: built, and filled from its folders.
            frozen: what it holds of these.
            quiet: say nothing.

        Returns what is left of `frozen`. Raises CheckpointError where a tensor is of another size, nothing fits, or a
        pattern matches nothing.
        """
        own = model.state_dict(keep_vars=True)
        tensors = {name: tensor for name, tensor in self._renamed(own).items() if name in own}
        for pattern in self.exclude:
            if not any(fnmatchcase(name, pattern) for name in tensors):
                raise CheckpointError(f"init_exclude: pattern {pattern!r} matches no tensor of {self.checkpoint}")
        tensors = {
            n: tensor for n, tensor in tensors.items() if not any(fnmatchcase(n, pattern) for pattern in self.exclude)
        }
        wrong = shape_mismatches({name: tensor.shape for name, tensor in tensors.items()}, own)
        if wrong or not tensors:
            raise CheckpointError(
                f"init_from={self.checkpoint} does not fit the model: {'; '.join(wrong) or 'no tensor in common'}; "
                "init_exclude=[PATTERN] leaves tensors as they are built"
            )
        copied = {name for name in tensors if not self._is_same(name, frozen)}
        with torch.no_grad():
            for name in copied:
                own[name].copy_(shard_like(tensors[name], own[name].detach()))
        if not quiet:
            left = sorted({name.rpartition(".")[0] for name in own.keys() - tensors.keys() if "lm_head" not in name})
            print(f"  starts from {self.checkpoint}" + (f"; newly built: {listed(left)}" if left else ""))
        return frozen.without(copied)

    def named_as(self, model: VPTModel) -> Mapping[str, Tensor]:
        """The tensors by the names that the model has for them."""
        return self._renamed(model.state_dict())

    def _renamed(self, own: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """The tensors of the checkpoint, named as in a model with the tensors `own`."""
        if has_adapters(own) == has_adapters(self.tensors):
            return self.tensors
        if has_adapters(self.tensors):
            return merged(self.tensors, load_config(self.checkpoint).model.lora)
        return {name: self.tensors[plain_name(name)] for name in own if plain_name(name) in self.tensors}

    def _is_same(self, name: str, frozen: FrozenWeights) -> bool:
        """Whether a tensor of the model is already what the checkpoint names, with nothing merged into it."""
        theirs = self.tensors.frozen
        source = theirs.source(name if name in theirs else plain_name(name))
        return source is not None and source == frozen.source(name)
