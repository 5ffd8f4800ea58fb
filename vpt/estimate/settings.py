"""The keys of `vpt estimate` besides those of `train.py`, and the model of a configuration without its weights."""

from dataclasses import dataclass, field, replace
from pathlib import Path

from vpt.checkpoint.upstream import UpstreamCheckpoint
from vpt.config.schema import TrainConfig, bounded, choice
from vpt.models.build import ModelBundle, build_bundle
from vpt.models.frozen_dtype import cast_frozen
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.training.optimizer import set_trainable


@dataclass
class AssumedConfig:
    """What is assumed about data and GPUs (`assume.*`)."""

    image: list[int] = field(default_factory=list)  # width, height; empty: data.image.max_side at 4:3
    crop: float = bounded(0.5, low=0.01, high=1.0)  # sides of a selected region, as a share of the image's
    question: int = bounded(40, low=1)  # tokens
    answer: int = bounded(30, low=1)  # tokens
    actions: dict[str, float] = field(default_factory=dict)  # share of each kind of sample; empty: data.actions
    gpu: str = choice("a100", "h100", "h200")  # which one: memory and peak
    gpus_per_node: int = bounded(8, low=1)  # that share one copy with strategy=hybrid
    peak_tflops: float | None = None  # null: the GPU's published peak
    utilisation: float = bounded(0.4, low=0.001, high=1.0)  # share of the peak that is reached
    records: list[int] = field(default_factory=lambda: [829_000, 1_000_000_000])  # days are told for each


@dataclass
class EstimateConfig(TrainConfig):
    """A run, where it is to run, and what is assumed about its data and its GPUs."""

    gpus: int = bounded(1, low=1)
    assume: AssumedConfig = field(default_factory=AssumedConfig)


def build_on_meta(config: TrainConfig) -> ModelBundle:
    """Every module and size of a run on the meta device, trained and frozen as there: no weights, no network.

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
    folder = Path(config.model.path) if config.model.path and not upstream else None
    bundle = build_bundle(settings, tiny_tokenizer(), sizes=sizes, fetch=False, folder=folder)
    set_trainable(bundle.model, config.optim, tower_pretrained=config.model.path is not None)
    cast_frozen(bundle.model, config.model.frozen_dtype)
    return bundle
