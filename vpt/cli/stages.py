"""The stage before: `python train.py +experiment=scenes/dino` trains `scenes/align_dino` first where it is not there.

A run names the experiment that it goes on from (`init_experiment`), and where that one's run is (`init_from`).
"""

from collections.abc import Sequence
from pathlib import Path

from vpt.checkpoint.load import trained_steps
from vpt.cli.train import train
from vpt.config.overrides import compose_train
from vpt.config.schema import TrainConfig
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError, ConfigError

# What an earlier stage has in common with the run that asks for it; all else is its own experiment's
SHARED = ("output_dir", "seed", "device", "threads", "pictures", "tracking", "strategy", "model", "debug", "data.root")


def train_stages(config: TrainConfig, folder: str | Path, overrides: Sequence[str]) -> float:
    """Train a run after the stages before it that are missing or unfinished. Returns the accuracy of the last.

    Args:
        config: of the run.
        folder: of the run.
        overrides: of its command line; stages before it are given those in `SHARED`.

    Raises:
        ConfigError: where a stage is missing and there are several processes, or its run is elsewhere.
    """
    if config.init_experiment and not _steps(folder):
        _train_before(config, [text for text in overrides if _is_shared(text)])
    return train(config, folder)


def _train_before(config: TrainConfig, shared: Sequence[str]) -> None:
    stage = compose_train([f"+experiment={config.init_experiment}", *shared])
    folder = Path(stage.output_dir) / stage.run_name
    if config.init_from is None or Path(config.init_from) != folder or _steps(folder) >= stage.training.steps:
        return
    if World.from_environment().size > 1:
        raise ConfigError(f"{folder} is not there; train +experiment={config.init_experiment} first")
    print(f"{folder} comes first: +experiment={config.init_experiment}")
    train_stages(stage, folder, shared)


def _is_shared(override: str) -> bool:
    key = override.lstrip("+~").partition("=")[0]
    return any(key == name or key.startswith(f"{name}.") for name in SHARED)


def _steps(folder: str | Path) -> int:
    """Steps of a run so far; 0 without a checkpoint."""
    try:
        return trained_steps(folder) or 0
    except CheckpointError:
        return 0
