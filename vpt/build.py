"""From a configuration to the parts: tokenizer, model, re-encoders, sample encoder."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vpt.backbone import build_processor, build_qwen, build_tokenizer, from_pretrained_or_hub, pixel_limits
from vpt.batch import VISION_TOWER
from vpt.config import ModelConfig, TrainConfig
from vpt.data.samples import ImageCache, PositionScheme, Processor
from vpt.data.template import ChatTemplate
from vpt.encoders.base import BuildContext, ImageTransform, ReEncoder
from vpt.encoders.views import QwenTransform
from vpt.errors import ConfigError
from vpt.freeze import RE_ENCODER, locate
from vpt.lora import inject
from vpt.model import InnerForwardConfig, VPTModel
from vpt.released import UpstreamCheckpoint
from vpt.sizes import Architecture
from vpt.tokens import PerceptionVocabulary, add_perception_tokens, resize_token_embeddings, stop_ids

if TYPE_CHECKING:
    from vpt.reply import Reply


@dataclass
class ModelBundle:
    """A model and what feeds it."""

    config: TrainConfig
    model: VPTModel
    tokenizer: PreTrainedTokenizerBase
    encoder: Processor

    def ask(self, image: str | Path, question: str, **settings: Any) -> "Reply":
        """Answer one question about one image; `vpt.reply.ask` says what may be set."""
        from vpt.reply import ask

        return ask(self, image, question, **settings)


def build_model(
    config: TrainConfig, *, tokenizer: PreTrainedTokenizerBase | None = None, sizes: Architecture | None = None,
    bare: bool = False,
) -> ModelBundle:  # fmt: skip
    """Make everything that a configuration describes.

    Args:
        config: frozen and validated.
        tokenizer: one that has grown already (from a checkpoint); else the base model's is loaded and grown.
        sizes: of a checkpoint whose weights the caller reads; else weights come from where the configuration says.
        bare: leave as shapes without memory, on `meta`, what the caller reads: Qwen, and where `sizes` are known (of
            a checkpoint, ours or a released one) the re-encoders too.
    """
    tokenizer = tokenizer or build_tokenizer(config.model)
    released = UpstreamCheckpoint.at(config.model.path) if sizes is None else None
    if released:
        sizes = released.sizes(config.encoder)
        with torch.device("meta"):
            released.check_size(build_model(config, tokenizer=tokenizer, sizes=sizes).model)
    vocabulary = extend_vocabulary(config, tokenizer)
    qwen = build_qwen(config.model, vocabulary, sizes, bare=bare)
    tower_view = QwenTransform(build_processor(qwen, config.data.image), video_size=pixel_limits(config.data.video))
    with torch.device("meta") if bare and sizes is not None else nullcontext():
        encoders = build_encoders(config, qwen, tower_view, sizes)
    model = VPTModel(qwen, encoders, vocabulary=vocabulary, forward_config=forward_config(config))
    if released:
        released.check(config.model)
        if not bare:
            released.load_into(model)
        for module in encoders.values():
            module.pretrained = True
    resize_token_embeddings(qwen, len(tokenizer))
    inject(qwen.model.language_model, config.model.lora)
    views = {VISION_TOWER: tower_view, **{name: encoder.transform for name, encoder in encoders.items()}}
    return ModelBundle(config, model, tokenizer, sample_encoder(config, model, tokenizer, views))


def extend_vocabulary(config: TrainConfig, tokenizer: PreTrainedTokenizerBase) -> PerceptionVocabulary:
    """Give a tokenizer the perception tokens of a configuration, and record their ids there."""
    spelling, bins = token_prefixes(config), config.model.region_bins
    token_bins, text_bins = (bins, 0) if config.model.region_format == "tokens" else (0, bins)
    add_perception_tokens(tokenizer, list(spelling.values()), region_bins=token_bins)
    stop_ids(tokenizer, config.generation.stop)  # a wrong one is better found now than after training
    vocabulary = PerceptionVocabulary.from_tokenizer(tokenizer, spelling, region_bins=token_bins, text_bins=text_bins)
    record_token_ids(config.model, vocabulary.upstream_ids(spelling))
    return vocabulary


def token_prefixes(config: TrainConfig) -> dict[str, str]:
    """How the tokens of each re-encoder are spelt."""
    return {name: encoder.token for name, encoder in config.encoder.items()}


def forward_config(config: TrainConfig) -> InnerForwardConfig:
    """How a configuration walks a conversation."""
    return InnerForwardConfig(
        inner_forward=config.model.inner_forward,  # type: ignore[arg-type]  # checked by freeze
        num_inner_forward_run=config.model.num_inner_forward_run,
        projector_scale=config.model.projector_scale,
        mask_mode=config.masking.mode,  # type: ignore[arg-type]
        checkpointing=config.model.activation_checkpointing,
    )


def sample_encoder(
    config: TrainConfig, model: VPTModel, tokenizer: PreTrainedTokenizerBase, views: dict[str, ImageTransform]
) -> Processor:
    """What turns records into rows for this model; `views` prepare the images of each source."""
    vision = model.qwen.config.vision_config
    numbering = PositionScheme(
        config.model.positions,  # type: ignore[arg-type]
        config.model.perceived_positions,  # type: ignore[arg-type]
        vision.spatial_merge_size,
        getattr(vision, "tokens_per_second", None),
    )
    return Processor(
        ChatTemplate(tokenizer, model.vocabulary, token_prefixes(config), projector_scale=config.model.projector_scale),
        views,
        numbering,
        max_length=config.data.max_length,
        overflow=config.data.on_too_long,  # type: ignore[arg-type]
        image_cache=ImageCache(config.data.cache_mb // max(config.data.workers, 1)),
    )


def record_token_ids(config: ModelConfig, ids: dict[str, int]) -> None:
    """Write the ids that the tokenizer gave into the configuration. Raises ConfigError where it holds others."""
    if config.token_ids and config.token_ids != ids:
        raise ConfigError(f"model.token_ids={config.token_ids}, but the tokenizer gives {ids}; leave the key out")
    config.token_ids = dict(ids)


def build_encoders(
    config: TrainConfig, qwen: PreTrainedModel, tower_view: QwenTransform, sizes: Architecture | None
) -> dict[str, ReEncoder]:
    """The re-encoders of the configuration, by name; random ones of `sizes` where those are given.

    An option of `settings.options` takes the place of the size's own, unless it is null.
    """
    encoders: dict[str, ReEncoder] = {}
    for name, settings in config.encoder.items():
        size = settings.sizes[settings.size]
        context = BuildContext(name, qwen.config.text_config.hidden_size, tower_view, config.model.projector_scale)
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
