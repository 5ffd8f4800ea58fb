"""From the `data` and `masking` groups of a configuration to sources, where their images lie, and masking."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from vpt.config.schema import DataConfig, SourceConfig, TrainConfig
from vpt.config.targets import SOURCE, locate
from vpt.data.balance import SampleCost
from vpt.data.images import MediaStore
from vpt.data.loader import StepDataset
from vpt.data.mixture import Mixture, build_mixture
from vpt.data.processor import Processor
from vpt.data.sources.base import Source, SourceContext
from vpt.data.videos import FrameSampling
from vpt.errors import ConfigError, DataError
from vpt.perception.masking import Masking


def build_sources(
    nodes: dict[str, SourceConfig], config: TrainConfig, *, split: str
) -> tuple[list[Source], list[MediaStore]]:
    """The sources of a split, and where the images of each lie."""
    data = config.data
    context = SourceContext(
        root=_root(data),
        encoder_tokens={name: encoder.token_prefix for name, encoder in config.encoder.items()}, actions=data.actions,
        action_prompt=data.action_prompt, perception=data.perception, token_matched_images=data.token_matched_images,
        region_bins=config.model.region_bins, seed=config.seed, media=partial(media_store, data=data),
    )  # fmt: skip
    if not nodes:
        raise DataError(f"data.{split} names no source; type data=easy_vqa or data=vpt")
    sources = [_with_options(node, f"data.{split}.{name}", context) for name, node in nodes.items()]
    return sources, [media_store(source.root, data, source.render) for source in sources]


def check_sources(config: TrainConfig, *splits: str) -> None:
    """Raise UserError where files or packages that the sources of these splits need are missing; opens nothing."""
    for split in splits:
        for name, node in getattr(config.data, split).items():
            _with_options(node, f"data.{split}.{name}", _root(config.data), method="check")


def _root(data: DataConfig) -> Path | None:
    return Path(data.root) if data.root else None


def _with_options(node: SourceConfig, key: str, first: Any, *, method: str | None = None) -> Any:
    """Call a source's class, or a method of it. Raises ConfigError where the node's options do not suit it."""
    kind = locate(node.target, f"{key}.target", SOURCE)
    try:
        return (getattr(kind, method) if method else kind)(first, **node.options)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"{key}.options={node.options} do not suit {node.target}: {error}") from error


def media_store(root: Path, data: DataConfig, draw: Callable[[str], Image.Image] | None = None) -> MediaStore:
    """Images below `root`, or those that `draw` makes, with the limits of `data.image` and `data.video`."""
    image, video = data.image, data.video
    sampling = FrameSampling(video.fps, video.max_frames)
    return MediaStore(
        root, max_side=image.max_side, crop_max_side=image.crop_max_side, resample=image.resample, sizing=image.sizing,
        max_pixels=image.max_file_pixels, apply_exif_rotation=image.apply_exif_rotation, sampling=sampling, render=draw,
    )  # fmt: skip


def build_dataset(config: TrainConfig, processor: Processor, *, rank: int, world_size: int) -> StepDataset:
    """The micro-batches of each step of a run that one process trains on."""
    data, training = config.data, config.training
    mixture, media = build_train_mixture(config)
    cost = None
    if world_size > 1:
        cost = SampleCost.estimate(processor, mixture.sources, media, data.on_error)  # type: ignore[arg-type]
    return StepDataset(
        mixture, media, processor, build_masking(config),
        batch_size=training.batch_size, micro_batch_size=training.micro_batch_size, steps=training.steps,
        rank=rank, ranks=world_size, cost=cost, on_error=data.on_error,  # type: ignore[arg-type]
    )  # fmt: skip


def build_train_mixture(config: TrainConfig) -> tuple[Mixture, list[MediaStore]]:
    """Which training record comes when, and where the images of each source lie."""
    data = config.data
    sources, media = build_sources(data.train, config, split="train")
    weights = [node.weight for node in data.train.values()]
    return build_mixture(sources, weights, config.seed, data.mixing), media  # type: ignore[arg-type]


def build_masking(config: TrainConfig) -> Masking:
    """The settings of `conf/masking`."""
    masking = config.masking
    return Masking(masking.para_mask_id, masking.para_mask_ratio, masking.mode, masking.draw)  # type: ignore[arg-type]
