"""The keys of `vpt pretrain` besides those of `train.py`."""

from dataclasses import dataclass, field

from vpt.config.fields import bounded
from vpt.config.schema import TrainConfig


@dataclass
class PatchConfig:
    """Learning to see (`patches.*`)."""

    part: str = "tower"  # what learns: the base model's tower, or a re-encoder by its name
    views: dict[str, int] = field(default_factory=dict)  # kind of image -> how many in a step
    test_images: int = bounded(50, low=1)  # of each kind, scored at the end


@dataclass
class PretrainConfig(TrainConfig):
    """One part, what it is shown, and how it learns: `optim`, `training.steps`, `training.checkpoint_every`, `seed`."""

    patches: PatchConfig = field(default_factory=PatchConfig)
    language: list[str] = field(default_factory=list)  # overrides of train.py: the stage in which a base learns to read
