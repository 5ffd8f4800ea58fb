"""A trained model from its folder: a run, one of its checkpoints, an exported folder, or an upstream checkpoint."""

from pathlib import Path

from transformers import Qwen2Tokenizer

from vpt.checkpoint.architecture_files import check_architecture, load_architecture
from vpt.checkpoint.checksums import sha256, verify
from vpt.checkpoint.format import find_checkpoint, load_config, load_tokenizer, load_weights
from vpt.checkpoint.initialize import BaseWeights, initialize, materialize
from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.config.overrides import compose_train
from vpt.config.schema import TrainConfig
from vpt.errors import wrap_read_errors
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.qwen import build_tokenizer
from vpt.utils.device import choose_device


def load_pretrained(path: str | Path, *, device: str = "auto") -> ModelBundle:
    """A trained model with its tokenizer and processor, ready to answer. Needs no folder but its own.

    Args:
        path: `outputs/RUN_NAME`, one of its `checkpoints`, a folder of `vpt export`, or an upstream checkpoint.
        device: `auto`, `cpu` or `cuda`.

    Raises:
        CheckpointError: where the folder holds no such thing, or is damaged.
        ConfigError: for `cuda` where there is no GPU.
    """
    target = choose_device(device)
    upstream = UpstreamCheckpoint.at(path)
    if upstream:
        fix = "it is no upstream checkpoint, or a damaged one: copy or download it again"
        with wrap_read_errors(upstream.folder, fix):
            bundle = build_model(from_upstream_config(upstream))
    else:
        found = find_checkpoint(path)
        verify(found)
        bundle = build_from_checkpoint(found, load_config(found))
        materialize(bundle.model, target)
        load_weights(found, bundle.model)
    bundle.model.to(target).eval()
    return bundle


def load_any_config(path: str | Path) -> TrainConfig:
    """The configuration of the model that `load_pretrained` would read, without reading its weights."""
    upstream = UpstreamCheckpoint.at(path)
    return from_upstream_config(upstream) if upstream else load_config(find_checkpoint(path))


def weights_digest(path: str | Path) -> str:
    """SHA-256 of each file of weights that `load_pretrained` would read."""
    upstream = UpstreamCheckpoint.at(path)
    folder = upstream.folder if upstream else find_checkpoint(path)
    return " ".join(map(sha256, sorted(folder.glob("*.safetensors" if upstream else "model*.safetensors"))))


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
    """Model, tokenizer and processor by the sizes of a checkpoint, on the meta device; its tensors fit the model."""
    tokenizer, sizes, stored = load_tokenizer(found), load_architecture(found / "sizes"), LazyStateDict(found).shapes
    check_architecture(sizes, where=found / "sizes", tensors=len(stored))
    with wrap_read_errors(found, "its sizes, its tokenizer and its config.yaml make no model: copy it again"):
        bundle = build_bundle(config, tokenizer, sizes=sizes)
        check_state_dict(stored, unique_state_dict(bundle.model), where=found)
    return bundle


def from_upstream_config(upstream: UpstreamCheckpoint) -> TrainConfig:
    """Our configuration of an upstream checkpoint: its settings, and defaults for all others."""
    stored = upstream.config
    settings = [f"{key}={stored[key]}" for key in ("num_inner_forward_run", "projector_scale") if key in stored]
    overrides = [
        "model=qwen2_vl_2b", "data=vpt", f"encoder=[{','.join(upstream.encoders)}]",
        f"model.path={upstream.folder.absolute()}", f"data.root={upstream.folder.absolute()}", "run_name=released",
        *(f"model.{setting}" for setting in settings),
    ]  # fmt: skip
    return compose_train(overrides)
