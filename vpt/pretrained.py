"""A trained model from its folder: a run, one of its checkpoints, an exported folder, or a released checkpoint."""

import hashlib
from contextlib import ExitStack
from pathlib import Path

import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra

from vpt import seal
from vpt.build import ModelBundle, build_model
from vpt.cli import CONF
from vpt.config import TrainConfig
from vpt.errors import ConfigError, wrap_read_errors
from vpt.freeze import resolve_config, validate
from vpt.released import UpstreamCheckpoint
from vpt.sizes import Architecture
from vpt.training import checkpoint
from vpt.weights import LazyStateDict, check_state_dict, unique_state_dict


def load(path: str | Path, *, device: str = "auto") -> ModelBundle:
    """A trained model, its tokenizer and what prepares its inputs, ready to answer.

    Needs no other folder: a checkpoint holds its parts' sizes.

    Args:
        path: `outputs/RUN_NAME`, one of its `checkpoints`, a folder made by `vpt.export`, or a released checkpoint.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        CheckpointError: where the folder holds no such thing, or is damaged.
        ConfigError: for `cuda` where there is no GPU.
    """
    target = choose_device(device)
    released = UpstreamCheckpoint.at(path)
    if released:
        with wrap_read_errors(
            released.folder, "it is no released checkpoint, or a damaged one: copy or download it again"
        ):
            parts = build_model(from_upstream_config(released))
    else:
        found = checkpoint.find_checkpoint(path)
        seal.verify(found)
        config = checkpoint.load_config(found)
        parts = build_from_checkpoint(found, config)
        checkpoint.load_weights(found, parts.model)
    parts.model.to(target).eval()
    return parts


def load_any_config(path: str | Path) -> TrainConfig:
    """The configuration of what `load` would read; takes no time."""
    released = UpstreamCheckpoint.at(path)
    return from_upstream_config(released) if released else checkpoint.load_config(checkpoint.find_checkpoint(path))


def weights_digest(path: str | Path) -> str:
    """What tells the weights that `load` would read from all others."""
    released = UpstreamCheckpoint.at(path)
    folder = released.folder if released else checkpoint.find_checkpoint(path)
    files = sorted(folder.glob("*.safetensors" if released else "model*.safetensors"))
    digests = []
    for name in files:
        with name.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def build_from_checkpoint(found: Path, config: TrainConfig, *, bare: bool = False) -> ModelBundle:
    """The parts of a checkpoint by its sizes and tokenizer; its weights are still to be read.

    `bare`: the model is shapes without memory (`vpt.training.start`).
    """
    tokenizer, sizes, stored = (
        checkpoint.load_tokenizer(found),
        Architecture.load(found / "sizes"),
        LazyStateDict(found).shapes,
    )
    sizes.validate(found / "sizes", tensors=len(stored))
    with wrap_read_errors(found, "its sizes, its tokenizer and its config.yaml make no model: copy it again"):
        with torch.device("meta"):  # sizes that are wrong cost no memory
            shapes = build_model(config, tokenizer=tokenizer, sizes=sizes).model
        check_state_dict(stored, unique_state_dict(shapes), where=found)
    return build_model(config, tokenizer=tokenizer, sizes=sizes, bare=bare)


def from_upstream_config(released: UpstreamCheckpoint) -> TrainConfig:
    """Our configuration of a released checkpoint: its settings, and defaults for what it does not say."""
    said = released.config
    settings = [f"{key}={said[key]}" for key in ("num_inner_forward_run", "projector_scale") if key in said]
    overrides = [
        "model=qwen2_vl_2b", "data=vpt", f"encoder=[{','.join(released.encoders)}]",
        f"model.path={released.folder.absolute()}", f"data.root={released.folder.absolute()}", "run_name=released",
        *(f"model.{setting}" for setting in settings),
    ]  # fmt: skip
    with ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # eval.py has done so
            stack.enter_context(initialize_config_dir(str(CONF), version_base=None))
        config = resolve_config(compose("train", overrides=overrides), TrainConfig)
    validate(config)
    return config


def choose_device(name: str) -> torch.device:
    """`auto` takes a GPU where there is one; of several, the one that is this process's.

    Raises:
        ConfigError: for `cuda` where there is none.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise ConfigError("device=cuda, but torch finds no GPU here; type device=cpu, or device=auto for what there is")
    return torch.device(name, torch.cuda.current_device()) if name == "cuda" else torch.device(name)
