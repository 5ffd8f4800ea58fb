"""The base model and its tokenizer, pretrained or of given sizes."""

from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any, TypeVar

import torch
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vpt.config.schema import ModelConfig
from vpt.errors import ConfigError
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.families import family_of
from vpt.models.tiny_tokenizer import tiny_tokenizer
from vpt.perception.tokens import CHAT_TOKENS, PerceptionVocabulary

Loaded = TypeVar("Loaded")


def build_tokenizer(config: ModelConfig, kind: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, read by transformers' class `kind`; the tiny one without `path`."""
    if config.path is None:
        return tiny_tokenizer()
    tokenizer = from_pretrained_or_hub(config.path, "model.path", lambda path: kind.from_pretrained(path))
    missing = [token for token in CHAT_TOKENS if token not in tokenizer.get_vocab()]
    if missing:
        raise ConfigError(f"the tokenizer in model.path={config.path} lacks {', '.join(missing)}: not a Qwen2-VL model")
    return tokenizer


def base_sizes(config: ModelConfig, vocabulary: PerceptionVocabulary, *, fetch: bool = True) -> dict[str, Any]:
    """transformers' configuration of the base model: that in `path`, else `config` with the ids of `vocabulary`.

    Args:
        config: `model` of the configuration.
        vocabulary: of the tokenizer.
        fetch: ask a hub too; else `config` stands for what is on a hub.

    Raises:
        ConfigError: where `path` holds another family.
    """
    if config.path is not None and (fetch or Path(config.path).is_dir()):
        stored = from_pretrained_or_hub(config.path, "model.path", lambda path: AutoConfig.from_pretrained(path))
        if stored.model_type != config.family:
            raise ConfigError(
                f"model.path={config.path} holds {stored.model_type}, model.family is {config.family}; "
                f"choose the model group that fits (model=qwen2_vl_2b, model=qwen2_5_vl_3b, ...)"
            )
        return stored.to_dict()
    return config.config | {
        "image_token_id": vocabulary.image_pad, "video_token_id": vocabulary.video_pad,
        "vision_start_token_id": vocabulary.vision_start, "vision_end_token_id": vocabulary.vision_end,
        "bos_token_id": vocabulary.end_of_text, "eos_token_id": vocabulary.im_end,
    }  # fmt: skip


def build_qwen(config: ModelConfig, sizes: dict[str, Any]) -> PreTrainedModel:
    """transformers' own model of these sizes, with random weights; without on the meta device."""
    config_class = family_of(config.family).config_class
    try:
        # a copy: transformers writes into nested dictionaries
        settings = config_class(**deepcopy(sizes))
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config is not accepted by {config_class.__name__}: {error}") from None
    return AutoModelForImageTextToText.from_config(
        settings, dtype=getattr(torch, config.dtype), attn_implementation=SEGMENT_ATTENTION
    )


def from_pretrained_or_hub(path: str | None, key: str, loader: Callable[[str | None], Loaded]) -> Loaded:
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


def resize_token_embeddings(model: PreTrainedModel, vocabulary_size: int, *, multiple_of: int = 64) -> None:
    """Make room in the embedding table for `vocabulary_size` ids.

    Qwen's tables have spare rows after the last id, so new ids usually fit and nothing changes. A table that is too
    short grows to the next multiple of `multiple_of`, its new rows at the mean of the old ones; it never shrinks, and
    tied weights stay tied.
    """
    table = model.get_input_embeddings()
    rows = table.weight.shape[0]
    if vocabulary_size <= rows:
        return
    model.resize_token_embeddings(vocabulary_size, pad_to_multiple_of=multiple_of, mean_resizing=False)
    heads: list[Any] = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        heads.append(model.get_output_embeddings())
    with torch.no_grad():
        for head in heads:
            head.weight[rows:] = head.weight[:rows].mean(dim=0)
