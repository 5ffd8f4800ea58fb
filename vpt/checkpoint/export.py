"""Write a trained model into a folder of its own, in one of five formats."""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save_file

from vpt.checkpoint.format import save_weights
from vpt.checkpoint.hub import check_name
from vpt.checkpoint.load import load_pretrained
from vpt.checkpoint.tensors import unique_state_dict
from vpt.checkpoint.upstream import to_upstream_name, upstream_config
from vpt.config.schema import TrainConfig
from vpt.errors import ConfigError, did_you_mean
from vpt.models.base_files import write_base_files
from vpt.models.build import ModelBundle
from vpt.models.lora import merged, peft_config, to_peft
from vpt.perception.batch import VISION_TOWER
from vpt.perception.tokens import stop_ids
from vpt.utils.files import atomic_folder


@dataclass(frozen=True)
class Export:
    """A `checkpoint`, the folder it is written `to`, and the `format` (vpt, upstream, qwen, peft, hub).

    Of `hub`: the `license` on its card, and the OWNER/NAME that it is uploaded as with `push`. `paths`: as of
    `vpt.checkpoint.load.load_pretrained`.
    """

    checkpoint: str
    to: str
    format: str = "vpt"
    license: str = "apache-2.0"
    push: str | None = None
    paths: Mapping[str, str] = field(default_factory=dict)


def export(wanted: Export, *, card: Callable[[Path, TrainConfig], None] | None = None) -> Path:
    """Load a checkpoint and write it. The folder is complete or absent.

    Args:
        wanted: what is written.
        card: writes the model card into a folder of the `hub` format.

    Raises ConfigError for an unknown format, a folder that exists, or a model that the format has no place for.
    """
    if wanted.format == "released":
        raise ConfigError("format=released is now format=upstream")
    if wanted.format not in WRITERS:
        raise ConfigError(
            f"format={wanted.format} is not one of {', '.join(WRITERS)}{did_you_mean(wanted.format, [*WRITERS])}"
        )
    if wanted.push is not None:
        if wanted.format != "hub":
            raise ConfigError(f"push={wanted.push} uploads format=hub, not format={wanted.format}; type format=hub")
        check_name(wanted.push)
    target = Path(wanted.to)
    if target.exists():
        raise ConfigError(f"{target} exists already; give another folder in to=FOLDER, or remove it")
    bundle = load_pretrained(wanted.checkpoint, device="cpu", paths=wanted.paths, exact=True)
    with atomic_folder(target) as draft:
        WRITERS[wanted.format](draft, bundle)
        if wanted.format == "hub" and card is not None:
            card(draft, bundle.config)
    return target


def _write_upstream(folder: Path, bundle: ModelBundle) -> None:
    """Flat configuration, tensors by upstream's names; `lm_head` apart, even where it is tied; adapters merged."""
    if not bundle.model.family.upstream:
        raise ConfigError(
            f"the upstream format holds Qwen2-VL only, this is a {bundle.model.family.title}; type format=vpt"
        )
    tensors = merged(unique_state_dict(bundle.model), bundle.config.model.lora)
    if bundle.model.qwen.config.tie_word_embeddings:
        tensors["qwen.lm_head.weight"] = bundle.model.qwen.lm_head.weight.detach().clone()
    try:
        renamed = {to_upstream_name(name): tensor.contiguous() for name, tensor in tensors.items()}
    except KeyError as error:
        raise ConfigError(f"{error.args[0]}: it knows dino, sam and clip; type format=vpt") from None
    save_file(renamed, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(upstream_config(bundle.model, bundle.config), indent=1))
    _write_base_files(folder, bundle)


def _write_qwen(folder: Path, bundle: ModelBundle) -> None:
    """transformers' own layout: a language model and its tower, without re-encoders; adapters merged."""
    if len(bundle.model.encoders):
        raise ConfigError(
            f"the re-encoders {', '.join(bundle.model.encoders)} have no place in a plain Qwen folder; type format=vpt"
        )
    tensors = merged(unique_state_dict(bundle.model.qwen), bundle.config.model.lora)
    bundle.model.qwen.save_pretrained(folder, state_dict=tensors)
    _write_base_files(folder, bundle)


def _write_peft(folder: Path, bundle: ModelBundle) -> None:
    """peft's own layout: adapters, and beside them the tables of tokens, which were trained with them."""
    lora, path = bundle.config.model.lora, bundle.config.model.path
    if not lora.rank:
        raise ConfigError("this model has no adapters (model.lora.rank=0); type format=vpt")
    tensors = unique_state_dict(bundle.model.qwen)
    save_file(to_peft(tensors), folder / "adapter_model.safetensors", metadata={"format": "pt"})
    peft_config(tensors, lora, base=path).save_pretrained(str(folder))
    bundle.tokenizer.save_pretrained(folder)


def _write_base_files(folder: Path, bundle: ModelBundle) -> None:
    """The tokenizer, and the settings by which transformers makes pixels of images and videos, and ends answers."""
    bundle.tokenizer.save_pretrained(folder)
    transform: Any = bundle.processor.transforms[VISION_TOWER]
    vocabulary = bundle.model.vocabulary
    ends = [vocabulary.im_end, vocabulary.end_of_text, *stop_ids(bundle.tokenizer, bundle.config.generation.stop)]
    write_base_files(folder, bundle.config, bundle.model.family, transform.processor, ends)


WRITERS: dict[str, Callable[[Path, ModelBundle], None]] = {
    "vpt": save_weights, "upstream": _write_upstream, "qwen": _write_qwen, "peft": _write_peft,
    "hub": save_weights,
}  # fmt: skip
