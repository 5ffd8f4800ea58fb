"""A configuration's model on the meta device: every module and size, no weights, no network."""

from dataclasses import replace
from pathlib import Path

from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.config.schema import TrainConfig
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.training.optimizer import set_trainable


def build_on_meta(config: TrainConfig) -> ModelBundle:
    """The parts of a configuration without weights, trained and frozen as a run would have them.

    Sizes are those of a local folder's `config.json`, or those in the configuration where `path` is a hub's name. Ids
    come from the tiny tokenizer: they count for nothing here.

    Raises:
        ConfigError: where a folder holds another kind of model.
    """
    settings = replace(
        config, model=replace(config.model, token_ids={}), generation=replace(config.generation, stop=[])
    )
    upstream = UpstreamCheckpoint.at(config.model.path)
    sizes = upstream.sizes(config.encoder) if upstream else None
    bundle = build_bundle(settings, tiny_tokenizer(), sizes=sizes, fetch=False)
    set_trainable(bundle.model, config.optim, tower_pretrained=config.model.path is not None)
    return bundle


def is_folder(path: str | None) -> bool:
    """Whether a path is a folder of this machine rather than a name on a hub."""
    return path is not None and Path(path).is_dir()
