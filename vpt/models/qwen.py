"""The base model and its tokenizer, pretrained or of given sizes."""

from collections.abc import Collection
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import snapshot_download
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from vpt.config.schema import ModelConfig
from vpt.config.weight_folder import check_weight_folder
from vpt.errors import ConfigError, first_line, wrap_read_errors
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.families import family_of
from vpt.models.tiny_tokenizer import LESSONS, tiny_tokenizer
from vpt.perception.tokens import CHAT_TOKENS, PerceptionVocabulary


def build_tokenizer(config: ModelConfig, kind: Any = AutoTokenizer) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, read by transformers' class `kind`; without `path` the tiny one, or the small one."""
    if config.path is None:
        return tiny_tokenizer(LESSONS if config.size == "small" else ())
    folder = local_folder(config.path, "model.path")
    try:
        return kind.from_pretrained(folder, local_files_only=True)
    except Exception as error:  # whatever its files hold
        raise ConfigError(
            f"the tokenizer in model.path={config.path} cannot be read: {first_line(error)}; copy its files "
            "again (tokenizer.json, or vocab.json and merges.txt)"
        ) from None


def check_tokenizer(
    tokenizer: PreTrainedTokenizerBase, sizes: PreTrainedConfig, *, size: int, where: str | Path
) -> None:
    """Raise ConfigError unless a tokenizer, of `size` tokens by now, is that of a model with these `sizes`."""
    vocabulary = tokenizer.get_vocab()
    lacks = [token for token in CHAT_TOKENS if token not in vocabulary]
    if lacks:
        raise ConfigError(f"the tokenizer in {where} lacks {', '.join(lacks)}: it is not of a Qwen-VL model")
    text = sizes.get_text_config()
    ends = ["<|im_end|>", "<|endoftext|>"]
    expected = {
        "image_token_id": ["<|image_pad|>"], "video_token_id": ["<|video_pad|>"], "eos_token_id": ends,
        "vision_start_token_id": ["<|vision_start|>"], "vision_end_token_id": ["<|vision_end|>"], "bos_token_id": ends,
    }  # fmt: skip
    wrong = []
    for key, tokens in expected.items():
        stored = getattr(sizes, key, None) if getattr(sizes, key, None) is not None else getattr(text, key, None)
        ids = {token: vocabulary[token] for token in tokens}
        if stored is not None and not set(stored if isinstance(stored, list) else [stored]) <= {*ids.values()}:
            named = " or ".join(f"{token} {number}" for token, number in ids.items())
            wrong.append(f"{key} is {stored}, the tokenizer has {named}")
    if size > text.vocab_size:
        wrong.append(f"it has {size} tokens, the model's table {text.vocab_size} rows")
    if wrong:
        raise ConfigError(
            f"the tokenizer in {where} is not that of its config.json: {'; '.join(wrong)}; copy the tokenizer's files "
            "from where the weights came from"
        )


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
        return read_sizes(config.path, "model.path", [config.family]).to_dict()
    return config.config | {
        "image_token_id": vocabulary.image_pad, "video_token_id": vocabulary.video_pad,
        "vision_start_token_id": vocabulary.vision_start, "vision_end_token_id": vocabulary.vision_end,
        "bos_token_id": vocabulary.end_of_text, "eos_token_id": vocabulary.im_end,
    }  # fmt: skip


def read_sizes(path: str, key: str, model_types: Collection[str] | None) -> PreTrainedConfig:
    """transformers' configuration in a folder or on a hub. Raises ConfigError where it is of another model type."""
    folder = local_folder(path, key)
    check_weight_folder(str(folder), key, model_types)
    with wrap_read_errors(folder / "config.json", "copy or download it again"):
        return AutoConfig.from_pretrained(folder, local_files_only=True)


def qwen_config(family: str, sizes: dict[str, Any]) -> PreTrainedConfig:
    """transformers' configuration of a base model of this family and these sizes."""
    config_class = family_of(family).config_class
    try:
        return config_class(**deepcopy(sizes))  # a copy: transformers writes into nested dictionaries
    except (TypeError, ValueError) as error:
        raise ConfigError(f"model.config is not accepted by {config_class.__name__}: {error}") from None


def build_qwen(config: ModelConfig, sizes: dict[str, Any]) -> PreTrainedModel:
    """transformers' own model of these sizes, with random weights; without on the meta device."""
    return AutoModelForImageTextToText.from_config(
        qwen_config(config.family, sizes), dtype=getattr(torch, config.dtype), attn_implementation=SEGMENT_ATTENTION
    )


def local_folder(path: str, key: str, *, weights: bool = False) -> Path:
    """A folder of weights, or a copy of the one of this name on a hub: its small files, or its `weights` too.

    Raises ConfigError that says what to type where a hub cannot be reached.
    """
    if Path(path).is_dir():
        return Path(path)
    print(f"fetching {path} from the hub ({key}=FOLDER takes a local copy)", flush=True)
    try:
        return Path(snapshot_download(path, allow_patterns=["*.json", "*.txt", *["model*.safetensors"] * weights]))
    except (OSError, ValueError) as error:
        raise ConfigError(
            f"{key}={path} could not be fetched from the hub ({first_line(error)}); without a network, download it "
            f"elsewhere and type {key}=FOLDER"
        ) from None


def resize_token_embeddings(model: PreTrainedModel, vocabulary_size: int) -> None:
    """Make room in the embedding table for `vocabulary_size` ids; what its new rows hold is left to whoever loads it.

    Qwen's tables have spare rows after the last id, so new ids usually fit and nothing changes. A table that is too
    short grows to the next multiple of 64; it never shrinks, and tied weights stay tied.
    """
    if vocabulary_size > len(model.get_input_embeddings().weight):
        model.resize_token_embeddings(vocabulary_size, pad_to_multiple_of=64, mean_resizing=False)
