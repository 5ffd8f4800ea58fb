"""A trained model from its folder: a run, one of its checkpoints, an exported folder, or an upstream checkpoint."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from transformers import Qwen2Tokenizer

from vpt.checkpoint.architecture_files import MAX_SIZE, check_architecture, load_architecture
from vpt.checkpoint.checksums import sha256, verify
from vpt.checkpoint.format import find_checkpoint, load_config, load_tokenizer
from vpt.checkpoint.frozen_part import read_parts
from vpt.checkpoint.frozen_weights import CheckpointTensors, FrozenWeights
from vpt.checkpoint.hub import fetched
from vpt.checkpoint.initialize import initialize, materialize
from vpt.checkpoint.pretrained import StoredWeights, is_tied
from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, fill, unique_state_dict
from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.config.overrides import compose_train
from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import weight_paths
from vpt.errors import wrap_read_errors
from vpt.models.build import ModelBundle, build_bundle, configured_sizes, extend_vocabulary
from vpt.models.frozen_dtype import cast_frozen
from vpt.models.quantization import round_base
from vpt.models.qwen import build_tokenizer, check_tokenizer, local_folder, qwen_config
from vpt.utils.device import choose_device


def load_pretrained(
    path: str | Path, *, device: str = "auto", paths: Mapping[str, str] | None = None, exact: bool = False
) -> ModelBundle:  # fmt: skip
    """A trained model with its tokenizer and processor, ready to answer.

    Args:
        path: `outputs/RUN_NAME`, one of its `checkpoints`, a folder of `vpt export`, an upstream checkpoint, or the
            name OWNER/NAME of such a folder on a hub.
        device: `auto`, `cpu` or `cuda`.
        paths: where folders are now that a checkpoint names instead of holding their frozen weights, such as
            `{"model.path": "NEW_PLACE"}`.
        exact: keep all weights as they are stored, to write them again. Otherwise matrices are held as
            `model.frozen_dtype`, which autocast rounds them to for every product, in training and here.

    Raises:
        CheckpointError: where the folder holds no such thing, or is damaged; where one that it names has changed.
        ConfigError: for `cuda` where there is no GPU.
    """
    target, path = choose_device(device), fetched(path)
    upstream = UpstreamCheckpoint.at(path)
    if upstream:
        fix = "it is no upstream checkpoint, or a damaged one: copy or download it again"
        with wrap_read_errors(upstream.folder, fix):
            bundle = build_model(from_upstream_config(upstream))
    else:
        found = find_checkpoint(path)
        verify(found)
        tensors = CheckpointTensors(found, FrozenWeights.named_by(found, paths).check(found))
        bundle = build_from_checkpoint(found, load_config(found), tensors.shapes)
        if not exact:
            cast_frozen(bundle.model, bundle.config.model.frozen_dtype, all_frozen=True)
        materialize(bundle.model, target)
        fill(bundle.model, tensors)
        if bundle.config.model.load_in_4bit:
            round_base(bundle.model, bundle.config.model.frozen_dtype)
            bundle.config.model.load_in_4bit = False  # of this model, which may be exported
    bundle.model.to(target).eval()
    return bundle


def load_any_config(path: str | Path, paths: Mapping[str, str] | None = None) -> TrainConfig:
    """The configuration of the model that `load_pretrained` would read, without reading its weights.

    Raises CheckpointError where a folder that it names is not there.
    """
    path = fetched(path)
    if upstream := UpstreamCheckpoint.at(path):
        return from_upstream_config(upstream)
    found = find_checkpoint(path)
    FrozenWeights.named_by(found, paths)
    return load_config(found)


def weights_digest(path: str | Path) -> str:
    """SHA-256 of each file of weights that `load_pretrained` would read."""
    path = fetched(path)
    upstream = UpstreamCheckpoint.at(path)
    folder = upstream.folder if upstream else find_checkpoint(path)
    held = map(sha256, sorted(folder.glob("*.safetensors" if upstream else "model*.safetensors")))
    named = [] if upstream else [part.files.result() for part in read_parts(folder)]
    return " ".join([*held, *(files[name] for files in named for name in sorted(files))])


def trained_steps(path: str | Path) -> int | None:
    """Steps of training behind a checkpoint; None where its folder does not say so, as of an exported model."""
    path = fetched(path)
    name = "" if UpstreamCheckpoint.at(path) else find_checkpoint(path).resolve().name
    return int(name.removeprefix("step_")) if name.startswith("step_") else None


def build_model(config: TrainConfig) -> ModelBundle:
    """A new model as configured, on the CPU, with the weights of its base model and random ones for what is new."""
    bundle, stored = build_new(config)
    materialize(bundle.model, "cpu")
    initialize(bundle, stored)
    return bundle


def build_new(config: TrainConfig) -> tuple[ModelBundle, list[StoredWeights]]:
    """A new model as configured, on the meta device, and the stored weights of its parts, which fit it."""
    if upstream := UpstreamCheckpoint.at(config.model.path):
        return _build_upstream(config, upstream)
    tokenizer, path = build_tokenizer(config.model), config.model.path
    known = len(tokenizer)
    sizes = configured_sizes(config, extend_vocabulary(config, tokenizer))
    keys = {"qwen.": "model.path"} | {f"encoders.{name}.vision.": f"encoder.{name}.path" for name in config.encoder}
    paths = weight_paths(config)
    tensors = {
        prefix: LazyStateDict(local_folder(paths[key], key, weights=True))
        for prefix, key in keys.items()
        if key in paths
    }
    check_architecture(sizes, where=Path("config.json"), tensors=max(map(len, tensors.values()), default=MAX_SIZE))
    if path is not None:
        if sizes.qwen.get("tie_word_embeddings"):
            sizes.qwen["tie_word_embeddings"] = is_tied(tensors["qwen."])
        base = qwen_config(config.model.family, sizes.qwen)
        check_tokenizer(tokenizer, base, size=known, where=path)
    rows = base.get_text_config().vocab_size if path is not None else 0
    folder = tensors["qwen."].folder if path is not None else None
    bundle = build_bundle(config, tokenizer, sizes=sizes, folder=folder)
    parts = {"qwen.": bundle.model.qwen}
    parts |= {f"encoders.{name}.vision.": vision for name, vision in bundle.model.visions.items()}
    return bundle, [
        StoredWeights.of_part(bundle.model, parts[prefix], prefix, stored, rows, keys[prefix])
        for prefix, stored in tensors.items()
    ]


def _build_upstream(config: TrainConfig, upstream: UpstreamCheckpoint) -> tuple[ModelBundle, list[StoredWeights]]:
    """`build_new` of an upstream checkpoint, which holds every part."""
    tokenizer = build_tokenizer(config.model, Qwen2Tokenizer)  # AutoTokenizer would warn about the model type
    sizes = upstream.sizes(config.encoder)
    base = qwen_config("qwen2_vl", sizes.qwen)
    check_tokenizer(tokenizer, base, size=len(tokenizer), where=upstream.folder)
    bundle = build_bundle(config, tokenizer, sizes=sizes)
    upstream.check_size(bundle.model)
    upstream.check(config.model)
    for name in bundle.model.encoders:
        bundle.model.encoder(name).pretrained = True
    places = upstream.places(tied=bundle.model.qwen.config.tie_word_embeddings)
    rows = base.get_text_config().vocab_size
    return bundle, [StoredWeights.match(bundle.model, upstream.tensors, places, "", rows=rows, key="model.path")]


def build_from_checkpoint(found: Path, config: TrainConfig, stored: Mapping[str, Sequence[int]]) -> ModelBundle:
    """Model, tokenizer and processor by the sizes of a checkpoint, on the meta device, whose `stored` shapes fit it."""
    tokenizer, sizes = load_tokenizer(found), load_architecture(found / "sizes")
    check_architecture(sizes, where=found / "sizes", tensors=len(stored))
    with wrap_read_errors(found, "its sizes, its tokenizer and its config.yaml make no model: copy it again"):
        base = qwen_config(config.model.family, sizes.qwen)
        check_tokenizer(tokenizer, base, size=len(tokenizer), where=found)
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
