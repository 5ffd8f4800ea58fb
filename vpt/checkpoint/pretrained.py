"""The tensors of a folder of weights, matched by name to the part of the model that they fill.

One rule for Qwen's folders, upstream's checkpoints and re-encoders: names and shapes are compared with the model's by
the headers of the files. What is missing, left over or of another shape is refused by name before any tensor is read.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import Chunk, WeightConverter

from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.distributed.dtensor import shard_like
from vpt.errors import CheckpointError
from vpt.models.lora import is_adapter, plain_name
from vpt.models.vpt import VPTModel

_TABLES = ("embed_tokens.weight", "lm_head.weight")  # a row for each token
# Parts of folders that nothing here uses: decoders and memory of SAM, text halves of CLIP and SigLIP, classifiers
_OTHER_PARTS = (
    "mask_decoder.", "prompt_encoder.", "shared_image_embedding.", "text_model.", "text_projection.",
    "visual_projection.", "logit_scale", "logit_bias", "classifier.", "memory_", "no_memory_", "no_object_pointer",
    "mask_downsample.", "object_pointer_proj.", "occlusion_spatial_", "temporal_positional_encoding_",
)  # fmt: skip
_BUFFERS = ("position_ids", "inv_freq")  # what older versions of transformers stored besides weights
_MASK_TOKEN = "embeddings.mask_token"  # of DINOv2's pretraining: zeros where a folder has none, and unused
_FLOATS = ("F64", "F32", "F16", "BF16")


class Place(NamedTuple):
    """Where a tensor of ours is stored: the `part`th of the `parts` equal parts of the tensor `name`."""

    name: str
    part: int = 0
    parts: int = 1

    def read(self, tensors: Mapping[str, Tensor]) -> Tensor:
        """The tensor itself."""
        whole = tensors[self.name]
        return whole if self.parts == 1 else whole.chunk(self.parts)[self.part]

    def shape(self, shapes: Mapping[str, Sequence[int]]) -> list[int]:
        """Its shape, by the shapes of what is stored; that of the whole where parts would not be equal."""
        shape = list(shapes[self.name])
        if self.parts > 1 and shape[0] % self.parts == 0:
            shape[0] //= self.parts
        return shape


@dataclass(frozen=True)
class StoredWeights:
    """Tensors by stored name, and those of the model that they fill.

    Attributes:
        places: our name, as in a model without adapters -> where it is stored.
        prefix: what the names of all tensors begin with that they fill; empty for the whole model.
        key: what names their folder in the configuration; empty where they are in none.
    """

    tensors: Mapping[str, Tensor]
    places: Mapping[str, Place]
    prefix: str
    key: str = ""

    @classmethod
    def match(
        cls, model: VPTModel, tensors: LazyStateDict, places: Mapping[str, Place], prefix: str, *, rows: int,
        key: str = "",
    ) -> "StoredWeights":  # fmt: skip
        """Compare the tensors of a folder with the part of the model below `prefix`; tables of tokens have `rows`.

        Raises CheckpointError that lists tensors that are missing, left over, or of another shape or kind.
        """
        found = cls(tensors, places, prefix, key)
        own = dict(found.targets(model))
        shapes: dict[str, list[int]] = {name: list(own[name].shape) for name in own if name.endswith(_MASK_TOKEN)}
        for name, place in places.items():
            shape = shapes[name] = place.shape(tensors.shapes)
            if name in own and name.endswith(_TABLES) and shape[:1] == [rows]:
                shape[0] = len(own[name])
        names = {name: place.name for name, place in places.items()}
        check_state_dict(shapes, own, where=tensors.folder, names=names)
        for stored in names.values():
            if tensors.dtype(stored) not in _FLOATS:
                kind = tensors.dtype(stored)
                raise CheckpointError(f"{tensors.folder}: {stored} is {kind}; give weights that are not quantized")
        return found

    @classmethod
    def of_part(
        cls, model: VPTModel, part: PreTrainedModel, prefix: str, tensors: LazyStateDict, rows: int, key: str
    ) -> "StoredWeights":
        """The tensors that transformers would read into `part`, which our names call `prefix`."""
        return cls.match(model, tensors, _places(part, prefix, tensors), prefix, rows=rows, key=key)

    def targets(self, model: VPTModel) -> Iterator[tuple[str, Tensor]]:
        """The tensors that are filled, adapters apart, each by its name in a model without adapters."""
        for name, tensor in unique_state_dict(model).items():
            if name.startswith(self.prefix) and not is_adapter(name):
                yield plain_name(name), tensor

    @torch.no_grad()
    def load(self, model: VPTModel) -> None:
        """Fill the model, which may be sharded. Rows by which the vocabulary has grown get the mean of the others."""
        for name, target in self.targets(model):
            if name not in self.places:  # the mask token
                target.zero_()
                continue
            tensor = self.places[name].read(self.tensors)
            if name.endswith(_TABLES):
                tensor = _extend_vocab(tensor.to(target.dtype), len(target))
            target.copy_(shard_like(tensor, target))


def _places(part: PreTrainedModel, prefix: str, tensors: LazyStateDict) -> dict[str, Place]:
    """Our name -> place of every tensor of a folder that is of use, by transformers' own table of former names.

    A tensor that belongs nowhere has its stored name.
    """
    steps: list[Any] = sorted(get_model_conversion_mapping(part), key=lambda step: isinstance(step, WeightConverter))
    known = {plain_name(name) for name in unique_state_dict(part)}
    base, places = f"{part.base_model_prefix}.", dict[str, Place]()
    for stored in tensors:
        name, fills = stored, [stored]
        for step in steps:
            before, (name, _) = name, step.rename_source_key(name)
            fills = [name]
            if isinstance(step, WeightConverter) and name != before:
                fills = _split(step, name)
                break
        for number, ours in enumerate(fills):
            spelt = (ours, ours.removeprefix(base), base + ours, ours.removeprefix("vision_encoder."))
            ours = next((spelling for spelling in spelt if spelling in known), ours)
            place = Place(stored, number, len(fills))
            if ours in known and prefix + ours not in places:
                places[prefix + ours] = place
            elif not _is_harmless(ours, part):
                places[stored] = place
    return places


def is_tied(tensors: LazyStateDict) -> bool:
    """Whether a head that is stored besides the table of tokens equals it, or none is; says so where it differs."""
    tables = ("model.embed_tokens.weight", "model.language_model.embed_tokens.weight")
    head, table = tensors.get("lm_head.weight"), next((tensors[name] for name in tables if name in tensors), None)
    if head is None or table is None or (head.dtype == table.dtype and torch.equal(head, table)):
        return True
    print(f"  {tensors.folder}: lm_head differs from the embedding, so the two are not tied", flush=True)
    return False


def _split(step: WeightConverter, name: str) -> list[str]:
    """The names of the tensors that a stored one is cut into; `name` is the first."""
    first, *others = step.target_patterns
    if not others or not isinstance(step.operations[0], Chunk) or step.operations[0].dim != 0:
        return [name]
    return [name, *(name.replace(first, other) for other in others)]


def _is_harmless(name: str, part: nn.Module) -> bool:
    """Whether a tensor that a part has no place for may be left out."""
    tied = name == "lm_head.weight" and part.config.tie_word_embeddings  # type: ignore[union-attr]
    return bool(tied) or name.startswith(_OTHER_PARTS) or name.endswith((*_BUFFERS, _MASK_TOKEN))


def _extend_vocab(table: Tensor, rows: int) -> Tensor:
    if len(table) >= rows:
        return table
    return torch.cat([table, table.mean(dim=0).expand(rows - len(table), -1)])
