"""Build a `ModelBundle` from a configuration: tokenizer, model, re-encoders, processor."""

from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vpt.config.schema import EncoderConfig, ModelConfig, TrainConfig
from vpt.config.targets import RE_ENCODER, locate
from vpt.data.chat_template import ChatTemplate
from vpt.data.image_cache import ImageCache
from vpt.data.positions import PositionScheme
from vpt.data.processor import Processor
from vpt.data.transforms import ImageTransform
from vpt.encoders.base import BuildContext, ReEncoder
from vpt.errors import ConfigError
from vpt.models.architecture import Architecture
from vpt.models.base_files import adopt_base_files
from vpt.models.families import family_of
from vpt.models.inner_forward import InnerForwardConfig
from vpt.models.lora import inject
from vpt.models.qwen import base_sizes, build_qwen, read_sizes, resize_token_embeddings
from vpt.models.vpt import VPTModel
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
    config: TrainConfig, tokenizer: PreTrainedTokenizerBase, *, sizes: Architecture | None = None, fetch: bool = True,
    folder: Path | None = None,
) -> ModelBundle:  # fmt: skip
    """Everything that a configuration describes; the model is on the meta device, without weights.

    Args:
        config: resolved and validated.
        tokenizer: of the base model, or of a checkpoint, with the perception tokens; it is given those that it lacks.
        sizes: of a checkpoint; else they are those of `model.path` and `encoder.X.path`, or of the configuration.
        fetch: ask hubs for sizes; else those of the configuration stand for them.
        folder: of the base model, whose files beside the weights are read.
    """
    vocabulary = extend_vocabulary(config, tokenizer)
    sizes = sizes or configured_sizes(config, vocabulary, fetch=fetch)
    with torch.device("meta"):
        qwen = build_qwen(config.model, sizes.qwen)
        family, vision = family_of(config.model.family), qwen.config.vision_config
        if config.model.thinking and not family.thinks:
            raise ConfigError(
                f"model.thinking=true is not for {family.title}, which has no thinking edition; leave it out"
            )
        adopt_base_files(config, family, vision, tokenizer, folder)
        transform = family.transform(vision, config.data.image, config.data.video)
        encoders = {
            name: build_encoder(config, name, qwen, transform, sizes=sizes.encoders.get(name, {}))
            for name in config.encoder
        }
        for encoder in encoders.values():
            for parameter in encoder.parameters():  # no buffer: frequencies stay float32
                parameter.data = parameter.data.to(qwen.dtype)
        model = VPTModel(qwen, encoders, vocabulary=vocabulary, forward_config=forward_config(config))
        resize_token_embeddings(qwen, len(tokenizer))
        inject(qwen.model.language_model, config.model.lora)
    transforms = {VISION_TOWER: transform, **{name: encoder.transform for name, encoder in encoders.items()}}
    return ModelBundle(config, model, tokenizer, build_sample_processor(config, model, tokenizer, transforms))


def configured_sizes(config: TrainConfig, vocabulary: PerceptionVocabulary, *, fetch: bool = True) -> Architecture:
    """Sizes of every part: those of `model.path` and `encoder.X.path`, or of the configuration."""
    return Architecture(
        base_sizes(config.model, vocabulary, fetch=fetch),
        {name: encoder_sizes(name, encoder, fetch=fetch) for name, encoder in config.encoder.items()},
    )


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
        model.family.tokens_per_second(vision),
    )
    return Processor(
        ChatTemplate(
            tokenizer,
            model.vocabulary,
            token_prefixes(config),
            projector_scale=config.model.projector_scale,
            system_prompt=model.family.system_prompt,
            thinking=config.model.thinking,
        ),
        transforms,
        position_scheme,
        max_length=config.data.max_length,
        overflow=config.data.overflow,  # type: ignore[arg-type]
        frames={name: encoder.frames for name, encoder in config.encoder.items()},
        image_cache=ImageCache(config.data.image_cache_mb // max(config.data.workers, 1)),
    )


def record_token_ids(config: ModelConfig, ids: dict[str, int]) -> None:
    """Write the ids that the tokenizer gave into the configuration. Raises ConfigError where it holds others."""
    if config.token_ids and config.token_ids != ids:
        raise ConfigError(f"model.token_ids={config.token_ids}, but the tokenizer gives {ids}; leave the key out")
    config.token_ids = dict(ids)


def encoder_sizes(name: str, encoder: EncoderConfig, *, fetch: bool = True) -> dict[str, Any]:
    """transformers' configuration of a re-encoder: that of its weights, else that of its size."""
    path = encoder.weights
    if path is None or not (fetch or Path(path).is_dir()):
        return encoder.sizes[encoder.size].config
    target = locate(encoder.target, f"encoder.{name}.target", RE_ENCODER)
    stored = read_sizes(path, f"encoder.{name}.path", target.types_of(encoder.options))
    return getattr(stored, "vision_config", stored).to_diff_dict()


def build_encoder(
    config: TrainConfig, name: str, qwen: PreTrainedModel, tower_transform: ImageTransform, *, sizes: dict[str, Any]
) -> ReEncoder:
    """A re-encoder of the configuration, its weights random; those that a folder holds are on the meta device.

    Args:
        config: an option of `encoder.X.options` takes the place of the size's own, unless it is null.
        name: which one.
        qwen: the language model it is built for.
        tower_transform: the transform of Qwen's own tower.
        sizes: transformers' configuration of it.
    """
    settings = config.encoder[name]
    stored = settings.weights is not None
    hidden_size, scale = qwen.config.text_config.hidden_size, config.model.projector_scale
    context = BuildContext(name, hidden_size, tower_transform, scale, stored=stored)
    target: Any = locate(settings.target, f"encoder.{name}.target", RE_ENCODER)
    given = {key: value for key, value in settings.options.items() if value is not None}
    try:
        encoder: ReEncoder = target.build(
            context, config=deepcopy(sizes), **{**settings.sizes[settings.size].options, **given}
        )
    except (TypeError, ValueError) as error:
        raise ConfigError(f"encoder.{name} cannot be built by {settings.target}: {error}") from error
    encoder.pretrained = encoder.pretrained or stored
    for parameter in encoder.projector.condition_parameters():
        parameter.data.mul_(config.model.condition_init)
    return encoder
