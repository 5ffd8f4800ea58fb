"""A trained model from its folder: a run, one of its checkpoints, an exported folder, or a released checkpoint."""

import hashlib
from contextlib import ExitStack
from pathlib import Path

from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from transformers import Qwen2Tokenizer

from vpt.checkpoint.architecture_files import check_architecture, load_architecture
from vpt.checkpoint.checksums import verify
from vpt.checkpoint.format import find_checkpoint, load_config, load_tokenizer, load_weights
from vpt.checkpoint.initialize import BaseWeights, initialize, materialize
from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.config.overrides import CONF, register_schemas
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.errors import wrap_read_errors
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.qwen import build_tokenizer
from vpt.utils.device import choose_device


def load_pretrained(path: str | Path, *, device: str = "auto") -> ModelBundle:
    """A trained model, its tokenizer and what prepares its inputs, ready to answer.

    Needs no other folder: a checkpoint holds its parts' sizes.

    Args:
        path: `outputs/RUN_NAME`, one of its `checkpoints`, a folder made by `vpt export`, or an upstream checkpoint.
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
        found = find_checkpoint(path)
        verify(found)
        config = load_config(found)
        parts = build_from_checkpoint(found, config)
        materialize(parts.model, target)
        load_weights(found, parts.model)
    parts.model.to(target).eval()
    return parts


def load_any_config(path: str | Path) -> TrainConfig:
    """The configuration of what `load_pretrained` would read; takes no time."""
    released = UpstreamCheckpoint.at(path)
    return from_upstream_config(released) if released else load_config(find_checkpoint(path))


def weights_digest(path: str | Path) -> str:
    """What tells the weights that `load_pretrained` would read from all others."""
    released = UpstreamCheckpoint.at(path)
    folder = released.folder if released else find_checkpoint(path)
    files = sorted(folder.glob("*.safetensors" if released else "model*.safetensors"))
    digests = []
    for name in files:
        with name.open("rb") as file:
            digests.append(hashlib.file_digest(file, "sha256").hexdigest())
    return " ".join(digests)


def build_model(config: TrainConfig) -> ModelBundle:
    """A new model as configured, on the CPU, with the weights of its base model and random ones for what is new."""
    bundle, stored = build_new(config)
    materialize(bundle.model, "cpu")
    initialize(bundle, stored)
    return bundle


def build_new(config: TrainConfig) -> tuple[ModelBundle, BaseWeights | None]:
    """A new model as configured, on the meta device, and the stored weights of its base model, which fit it."""
    upstream = UpstreamCheckpoint.at(config.model.path)
    if upstream is None:
        bundle = build_bundle(config, build_tokenizer(config.model))
    else:  # AutoTokenizer would warn about the model type
        tokenizer = build_tokenizer(config.model, Qwen2Tokenizer)
        bundle = build_bundle(config, tokenizer, sizes=upstream.sizes(config.encoder))
        upstream.check_size(bundle.model)
        upstream.check(config.model)
        for name in bundle.model.encoders:
            bundle.model.encoder(name).pretrained = True
    return bundle, BaseWeights.find(bundle.model, config.model.path) if config.model.path is not None else None


def build_from_checkpoint(found: Path, config: TrainConfig) -> ModelBundle:
    """The parts of a checkpoint by its sizes and tokenizer, on the meta device; its tensors fit the model."""
    tokenizer, sizes, stored = load_tokenizer(found), load_architecture(found / "sizes"), LazyStateDict(found).shapes
    check_architecture(sizes, where=found / "sizes", tensors=len(stored))
    with wrap_read_errors(found, "its sizes, its tokenizer and its config.yaml make no model: copy it again"):
        bundle = build_bundle(config, tokenizer, sizes=sizes)
        check_state_dict(stored, unique_state_dict(bundle.model), where=found)
    return bundle


def from_upstream_config(released: UpstreamCheckpoint) -> TrainConfig:
    """Our configuration of a released checkpoint: its settings, and defaults for what it does not say."""
    said = released.config
    settings = [f"{key}={said[key]}" for key in ("num_inner_forward_run", "projector_scale") if key in said]
    overrides = [
        "model=qwen2_vl_2b", "data=vpt", f"encoder=[{','.join(released.encoders)}]",
        f"model.path={released.folder.absolute()}", f"data.root={released.folder.absolute()}", "run_name=released",
        *(f"model.{setting}" for setting in settings),
    ]  # fmt: skip
    register_schemas()
    with ExitStack() as stack:
        if not GlobalHydra.instance().is_initialized():  # eval.py has done so
            stack.enter_context(initialize_config_dir(str(CONF), version_base=None))
        config = resolve_config(compose("train", overrides=overrides), TrainConfig)
    validate(config)
    return config
