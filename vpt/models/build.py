"""Build a `ModelBundle` from a configuration: tokenizer, model, re-encoders, processor."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpt.config.schema import ModelConfig, TrainConfig
from vpt.config.targets import RE_ENCODER, locate
from vpt.data.chat_template import ChatTemplate
from vpt.data.image_cache import ImageCache
from vpt.data.processor import PositionScheme, Processor
from vpt.data.transforms import ImageTransform
from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.transforms import QwenTransform
from vpt.errors import ConfigError
from vpt.models.architecture import Architecture
from vpt.models.lora import inject
from vpt.models.qwen import (
    build_processor,
    build_qwen,
    from_pretrained_or_hub,
    pixel_limits,
    resize_token_embeddings,
)  # fmt: skip
from vpt.models.vpt import InnerForwardConfig, VPTModel
from vpt.perception.batch import VISION_TOWER
from vpt.perception.tokens import PerceptionVocabulary, add_perception_tokens, stop_ids


@dataclass
class ModelBundle:
    """A model with its configuration, tokenizer and processor."""

    config: TrainConfig
    model: VPTModel
    tokenizer: PreTrainedTokenizerBase
    processor: Processor


def build_bundle(
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, sizes: Architecture | None = None, bare: bool = False,
    read_weights: Callable[[VPTModel], None] | None = None,
) -> ModelBundle:  # fmt: skip
    """Make everything that a configuration describes.

    Args:
        config: resolved and validated.
        tokenizer: of the base model, or of a checkpoint, with the perception tokens; it is given those that it lacks.
        sizes: of a checkpoint whose weights the caller reads; else weights come from where the configuration says.
        bare: leave as shapes without memory, on `meta`, what the caller reads: Qwen, and where `sizes` are known the
            re-encoders too.
        read_weights: fills the model before its vocabulary is extended and adapters are injected.
    """
    vocabulary = extend_vocabulary(config, tokenizer)
    qwen = build_qwen(config.model, vocabulary, sizes, bare=bare)
    images = build_processor(qwen, config.data.image)
    tower_transform = QwenTransform(images, video_size=pixel_limits(config.data.video))
    with torch.device("meta") if bare and sizes is not None else nullcontext():
        encoders = build_encoders(config, qwen, tower_transform, sizes)
    model = VPTModel(qwen, encoders, vocabulary=vocabulary, forward_config=forward_config(config))
    if read_weights is not None:
        read_weights(model)
    resize_token_embeddings(qwen, len(tokenizer))
    inject(qwen.model.language_model, config.model.lora)
    transforms = {VISION_TOWER: tower_transform, **{name: encoder.transform for name, encoder in encoders.items()}}
    return ModelBundle(config, model, tokenizer, build_sample_processor(config, model, tokenizer, transforms))


def extend_vocabulary(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PerceptionVocabulary:
    """Give a tokenizer the perception tokens of a configuration, and record their ids there."""
    prefixes, bins = token_prefixes(config), config.model.region_bins
    token_bins, text_bins = (bins, 0) if config.model.region_format == "tokens" else (0, bins)
    add_perception_tokens(tokenizer, list(prefixes.values()), region_bins=token_bins)
    stop_ids(tokenizer, config.generation.stop)  # a wrong one is better found now than after training
    vocabulary = PerceptionVocabulary.from_tokenizer(tokenizer, prefixes, region_bins=token_bins, text_bins=text_bins)
    record_token_ids(config.model, vocabulary.upstream_ids(prefixes))
    return vocabulary


def token_prefixes(config: TrainConfig) -> dict[str, str]:
    """How the tokens of each re-encoder are spelt."""
    return {name: encoder.token_prefix for name, encoder in config.encoder.items()}


def forward_config(config: TrainConfig) -> InnerForwardConfig:
    """The inner forward of a configuration."""
    return InnerForwardConfig(
        inner_forward=config.model.inner_forward,  # type: ignore[arg-type]  # checked by resolve_config
        num_inner_forward_run=config.model.num_inner_forward_run,
        projector_scale=config.model.projector_scale,
        mask_mode=config.masking.mode,  # type: ignore[arg-type]
        checkpointing=config.model.activation_checkpointing,
    )


def build_sample_processor(
    config: TrainConfig, model: VPTModel, tokenizer: PreTrainedTokenizerBase, transforms: dict[str, ImageTransform]
) -> Processor:
    """The processor of this model; `transforms` prepare the images of each source."""
    vision = model.qwen.config.vision_config
    position_scheme = PositionScheme(
        config.model.positions,  # type: ignore[arg-type]
        config.model.reencoded_positions,  # type: ignore[arg-type]
        vision.spatial_merge_size,
        getattr(vision, "tokens_per_second", None),
    )
    return Processor(
        ChatTemplate(tokenizer, model.vocabulary, token_prefixes(config), projector_scale=config.model.projector_scale),
        transforms,
        position_scheme,
        max_length=config.data.max_length,
        overflow=config.data.overflow,  # type: ignore[arg-type]
        image_cache=ImageCache(config.data.image_cache_mb // max(config.data.workers, 1)),
    )


def record_token_ids(config: ModelConfig, ids: dict[str, int]) -> None:
    """Write the ids that the tokenizer gave into the configuration. Raises ConfigError where it holds others."""
    if config.token_ids and config.token_ids != ids:
        raise ConfigError(f"model.token_ids={config.token_ids}, but the tokenizer gives {ids}; leave the key out")
    config.token_ids = dict(ids)


def build_encoders(
    config: TrainConfig, qwen: PreTrainedModel, tower_transform: QwenTransform, sizes: Architecture | None
) -> dict[str, ReEncoder]:
    """The re-encoders of the configuration, by name; random ones of `sizes` where those are given.

    An option of `settings.options` takes the place of the size's own, unless it is null.
    """
    encoders: dict[str, ReEncoder] = {}
    for name, settings in config.encoder.items():
        size = settings.sizes[settings.size]
        context = BuildContext(name, qwen.config.text_config.hidden_size, tower_transform, config.model.projector_scale)
        weights = settings.path or size.weights
        arguments = deepcopy(size.config if sizes is None else sizes.encoders.get(name, {}))
        target = locate(settings.target, f"encoder.{name}.target", RE_ENCODER)
        given = {key: value for key, value in settings.options.items() if value is not None}
        make = partial(target.build, context, config=arguments, **{**size.options, **given})  # type: ignore[attr-defined]
        source = weights if sizes is None else None
        encoder: ReEncoder = from_pretrained_or_hub(source, f"encoder.{name}.path", partial(_with_weights, make))
        encoder.pretrained = encoder.pretrained or weights is not None
        encoders[name] = encoder.to(qwen.dtype)
    return encoders


def _with_weights(make: Callable[..., ReEncoder], path: str | None) -> ReEncoder:
    return make(weights=path)
