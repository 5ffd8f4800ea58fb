"""From a configuration to the parts: tokenizer, model, sample encoder, sources."""

from collections.abc import Callable
from contextlib import nullcontext
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Tokenizer,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
)
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt.attention import SEGMENTS
from vpt.batch import TOWER
from vpt.config import ImageConfig, ModelConfig, TrainConfig, VideoConfig
from vpt.data.samples import LookCache, Numbering, SampleEncoder
from vpt.data.template import Template
from vpt.encoders.base import BuildContext, ReEncoder
from vpt.encoders.views import TowerView
from vpt.errors import ConfigError
from vpt.freeze import RE_ENCODER, locate
from vpt.lora import inject
from vpt.model import InnerPasses, VPTModel
from vpt.released import ReleasedCheckpoint
from vpt.sizes import Sizes
from vpt.tiny import tiny_tokenizer
from vpt.tokens import CHAT_TOKENS, PerceptionVocabulary, grow_embedding, grow_tokenizer, stop_ids

if TYPE_CHECKING:
    from vpt.reply import Reply

FAMILIES = {
    "qwen2_vl": (Qwen2VLConfig, Qwen2VLForConditionalGeneration),
    "qwen2_5_vl": (Qwen2_5_VLConfig, Qwen2_5_VLForConditionalGeneration),
}

Loaded = TypeVar("Loaded")


@dataclass
class Parts:
    """A model and what feeds it."""

    config: TrainConfig
    model: VPTModel
    tokenizer: PreTrainedTokenizerBase
    encoder: SampleEncoder

    def ask(self, image: str | Path, question: str, **settings: Any) -> "Reply":
        """Answer one question about one image; `vpt.reply.ask` says what may be set."""
        from vpt.reply import ask

        return ask(self, image, question, **settings)


def build(
    config: TrainConfig, *, tokenizer: PreTrainedTokenizerBase | None = None, sizes: Sizes | None = None,
    bare: bool = False,
) -> Parts:  # fmt: skip
    """Make everything that a configuration describes.

    Args:
        config: frozen and validated.
        tokenizer: one that has grown already (from a checkpoint); else the base model's is loaded and grown.
        sizes: of a checkpoint whose weights the caller reads; else weights come from where the configuration says.
        bare: leave as shapes without memory, on `meta`, what the caller reads: Qwen, and where `sizes` are known (of
            a checkpoint, ours or a released one) the re-encoders too.
    """
    released = ReleasedCheckpoint.at(config.model.path) if sizes is None else None
    if released:
        sizes, tokenizer = released.sizes(config.encoder), tokenizer or build_tokenizer(config.model)
        with torch.device("meta"):
            released.check_size(build(config, tokenizer=tokenizer, sizes=sizes).model)
    spelling = {name: encoder.token for name, encoder in config.encoder.items()}
    if tokenizer is None:
        tokenizer = build_tokenizer(config.model)
    bins = config.model.region_bins
    token_bins, text_bins = (bins, 0) if config.model.region_format == "tokens" else (0, bins)
    grow_tokenizer(tokenizer, list(spelling.values()), region_bins=token_bins)
    stop_ids(tokenizer, config.generation.stop)  # a wrong one is better found now than after training
    vocabulary = PerceptionVocabulary.from_tokenizer(tokenizer, spelling, region_bins=token_bins, text_bins=text_bins)
    record_ids(config.model, vocabulary.released_ids(spelling))
    qwen = build_qwen(config.model, vocabulary, sizes, bare=bare)
    tower_view = TowerView(build_processor(qwen, config.data.image), video_size=pixel_limits(config.data.video))
    with torch.device("meta") if bare and sizes is not None else nullcontext():
        encoders = build_encoders(config, qwen, tower_view, sizes)
    passes = InnerPasses(
        inner_forward=config.model.inner_forward,  # type: ignore[arg-type]  # checked by freeze
        num_inner_forward_run=config.model.num_inner_forward_run,
        projector_scale=config.model.projector_scale,
        mask_mode=config.masking.mode,  # type: ignore[arg-type]
        checkpointing=config.model.activation_checkpointing,
    )
    model = VPTModel(qwen, encoders, vocabulary=vocabulary, passes=passes)
    if released:
        released.check(config.model)
        if not bare:
            released.load_into(model)
        for module in encoders.values():
            module.pretrained = True
    grow_embedding(qwen, len(tokenizer))
    inject(qwen.model.language_model, config.model.lora)
    views = {TOWER: tower_view, **{name: encoder.view for name, encoder in encoders.items()}}
    template = Template(tokenizer, vocabulary, spelling, projector_scale=config.model.projector_scale)
    vision = qwen.config.vision_config
    encoder = SampleEncoder(
        template,
        views,
        Numbering(
            config.model.positions,  # type: ignore[arg-type]
            config.model.perceived_positions,  # type: ignore[arg-type]
            vision.spatial_merge_size,
            getattr(vision, "tokens_per_second", None),
        ),
        max_length=config.data.max_length,
        on_too_long=config.data.on_too_long,  # type: ignore[arg-type]
        cache=LookCache(config.data.cache_mb // max(config.data.workers, 1)),
    )
    return Parts(config, model, tokenizer, encoder)


def record_ids(config: ModelConfig, ids: dict[str, int]) -> None:
    """Write the ids that the tokenizer gave into the configuration. Raises ConfigError where it holds others."""
    if config.token_ids and config.token_ids != ids:
        raise ConfigError(f"model.token_ids={config.token_ids}, but the tokenizer gives {ids}; leave the key out")
    config.token_ids = dict(ids)


def build_tokenizer(config: ModelConfig) -> PreTrainedTokenizerBase:
    """The base model's tokenizer; the tiny one where there are no weights to match."""
    if config.path is None:
        return tiny_tokenizer()
    # AutoTokenizer would warn about the model type of a released checkpoint.
    kind = Qwen2Tokenizer if ReleasedCheckpoint.at(config.path) else AutoTokenizer
    tokenizer = load(config.path, "model.path", lambda path: kind.from_pretrained(path))
    missing = [token for token in CHAT_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(f"the tokenizer in model.path={config.path} lacks {', '.join(missing)}: not a Qwen2-VL model")
    return tokenizer


def build_qwen(
    config: ModelConfig, vocabulary: PerceptionVocabulary, sizes: Sizes | None, *, bare: bool = False
) -> PreTrainedModel:  # fmt: skip
    """transformers' own Qwen2-VL or Qwen2.5-VL: with weights from `path`, or random ones of `sizes` or `config`.

    `bare`: shapes without memory.
    """
    config_class, model_class = FAMILIES[config.family]
    dtype = getattr(torch, config.dtype)
    if sizes is not None:
        with torch.device("meta") if bare else nullcontext():
            return model_class(config_class(**deepcopy(sizes.qwen), attn_implementation=SEGMENTS)).to(dtype)
    if config.path is not None:
        qwen = load(config.path, "model.path", partial(_qwen_shapes if bare else _qwen_weights, dtype=dtype))
        if qwen.config.model_type != config.family:
            raise ConfigError(
                f"model.path={config.path} holds a {qwen.config.model_type}, model.family is {config.family}; "
                f"choose the model group that fits (model=qwen2_vl_2b, model=qwen2_5_vl_3b, ...)"
            )
        return qwen
    ids = {
        "image_token_id": vocabulary.image_pad, "video_token_id": vocabulary.video_pad,
        "vision_start_token_id": vocabulary.vision_start, "vision_end_token_id": vocabulary.vision_end,
        "bos_token_id": vocabulary.end_of_text, "eos_token_id": vocabulary.im_end,
    }  # fmt: skip
    try:
        # a copy: transformers writes into nested dictionaries
        sizes = config_class(**{**deepcopy(config.config), **ids}, attn_implementation=SEGMENTS)
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config is not accepted by {config_class.__name__}: {error}") from None
    return model_class(sizes).to(dtype)


def _qwen_weights(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    return AutoModelForImageTextToText.from_pretrained(path, dtype=dtype, attn_implementation=SEGMENTS)


def _qwen_shapes(path: str, *, dtype: torch.dtype) -> PreTrainedModel:
    with torch.device("meta"):
        sizes = AutoConfig.from_pretrained(path)
        return AutoModelForImageTextToText.from_config(sizes, dtype=dtype, attn_implementation=SEGMENTS)


def build_processor(qwen: PreTrainedModel, limits: ImageConfig) -> Qwen2VLImageProcessorPil:
    """transformers' Pillow image processor for this model's patches."""
    vision = qwen.config.vision_config
    return Qwen2VLImageProcessorPil(
        patch_size=vision.patch_size,
        merge_size=vision.spatial_merge_size,
        temporal_patch_size=vision.temporal_patch_size,
        size=pixel_limits(limits),
    )


def pixel_limits(limits: ImageConfig | VideoConfig) -> dict[str, int]:
    """Pixels of an image or frame, at least and at most, as transformers' processors spell it."""
    return {"shortest_edge": limits.min_pixels, "longest_edge": limits.max_pixels}


def build_encoders(
    config: TrainConfig, qwen: PreTrainedModel, tower_view: TowerView, sizes: Sizes | None
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
        encoder: ReEncoder = load(source, f"encoder.{name}.path", partial(_with_weights, make))
        encoder.pretrained = encoder.pretrained or weights is not None
        encoders[name] = encoder.to(qwen.dtype)
    return encoders


def _with_weights(make: Callable[..., ReEncoder], path: str | None) -> ReEncoder:
    return make(weights=path)


def load(path: str | None, key: str, loader: Callable[[str | None], Loaded]) -> Loaded:
    """Call a loader of transformers; say what to type where a folder is no model or a hub cannot be reached."""
    if path is not None and not Path(path).is_dir():
        print(f"fetching {path} from the hub ({key}=FOLDER takes a local copy)", flush=True)
    try:
        return loader(path)
    except (OSError, ValueError) as error:  # transformers raises either
        if path is None:
            raise
        if Path(path).is_dir():
            raise ConfigError(f"{key}={path} is not a folder of weights: {_first_line(error)}") from None
        raise ConfigError(
            f"{key}={path} could not be fetched from the hub ({_first_line(error)}); without a network, download it "
            f"elsewhere and type {key}=FOLDER"
        ) from None


def _first_line(error: Exception) -> str:
    return str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
