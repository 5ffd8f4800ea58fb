"""`extend`: run the decoder over the segments of one stage, on top of the keys and values of earlier stages.

It is the one operation of this project. Training runs it over segments that come from the data, generation over
segments that come from the model (`vpt.generation.generator`); in between, control states are read and images seen.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import config as dynamo
from torch.utils.checkpoint import checkpoint

from vpt.models.attention import AttentionLayout
from vpt.perception.segments import InnerForward, MaskMode


@dataclass(frozen=True)
class InnerForwardConfig:
    """How the stages of a conversation are run.

    Attributes:
        inner_forward: `shared` runs every segment once; `full` runs whole passes, the reference.
        num_inner_forward_run: 2, or 1 for the alignment stage: no control states, nothing conditioned.
        projector_scale: control tokens of an action.
        mask_mode: what masking does to a masked row (`vpt.perception.masking`).
        checkpointing: recompute decoder layers in the backward pass.
    """

    inner_forward: InnerForward = "shared"
    num_inner_forward_run: int = 2
    projector_scale: int = 1
    mask_mode: MaskMode = "zero"
    checkpointing: bool = False


@dataclass(frozen=True)
class DeepFeatures:
    """DeepStack: `features` [k, T, D] are added to the hidden states at `positions` [T] of a stage, after each of the
    first k decoder layers in turn."""

    positions: Tensor
    features: Tensor


KeyValues = dict[int, tuple[Tensor, Tensor]]  # layer -> keys and values, [1, kv heads, N, d] each


class StagedKVCache:
    """Keys and values of every stage so far, kept as they were computed so that gradients reach them."""

    def __init__(self) -> None:
        self.stages: list[KeyValues] = []

    def new_stage(self) -> "StageKV":
        """The cache that the next stage runs on."""
        self.stages.append({})
        return StageKV(self.stages[:-1], self.stages[-1])


class StageKV:
    """Keys and values of earlier stages and of one stage. It has the `update` of transformers' caches.

    It goes on naming the same stages after later ones have run: a layer that is recomputed in the backward pass then
    finds what it found in the forward pass. Not a dataclass: sharding copies those among a layer's arguments.
    """

    def __init__(self, earlier: list[KeyValues], own: KeyValues) -> None:
        self.earlier, self.own = earlier, own

    @torch.compiler.disable
    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """A layer hands in its own keys and values and gets back all of them, [1, kv heads, N of all stages, d]."""
        self.own.setdefault(layer, (key, value))
        if not self.earlier:
            return key, value
        keys, values = zip(*(stage[layer] for stage in self.earlier), strict=True)
        return torch.cat([*keys, key], dim=2), torch.cat([*values, value], dim=2)


def extend(
    language: Any, cache: object, embeddings: Tensor, positions: Tensor, layout: AttentionLayout, *,
    deep: DeepFeatures | None = None, logits_to_keep: Tensor | None = None, checkpointing: bool = False,
) -> Tensor:  # fmt: skip
    """Run the decoder over packed embeddings, on top of what is cached.

    Args:
        language: transformers' text model (`layers`, `norm`, `rotary_emb`).
        cache: anything with `update(key, value, layer)`.
        embeddings: [N, D].
        positions: [3, N].
        layout: who attends to whom.
        deep: what is added between the first layers.
        logits_to_keep: [h] the positions whose hidden states are wanted, or None for all; keys are kept of all.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        [h, D], the final-normed hidden states.
    """
    hidden = embeddings[None]
    rope = language.rotary_emb(hidden, positions[:, None])
    for number, layer in enumerate(language.layers):
        call = {"position_embeddings": rope, "past_key_values": cache, "layout": layout}
        if layer is language.layers[-1]:
            call["logits_to_keep"] = logits_to_keep
        hidden = checkpoint(layer, hidden, use_reentrant=False, **call) if checkpointing else layer(hidden, **call)
        if deep is not None and number < len(deep.features):
            hidden = hidden.index_add(1, deep.positions, deep.features[number][None].to(hidden.dtype))
    return language.norm(hidden)[0]


class LastDecoderLayer(nn.Module):
    """The last decoder layer, made of the modules of transformers' layer; its MLP runs only where it is read.

    Its keys and values are needed of every position, what comes after its attention only at positions in
    `logits_to_keep`: a fifth of the positions or less in training, one while a prompt is read.
    """

    def __init__(self, layer: nn.Module) -> None:
        """Take over the modules of `layer`."""
        super().__init__()
        for name, child in layer.named_children():
            self.add_module(name, child)
        self.training = layer.training

    def forward(self, hidden_states: Tensor, *, logits_to_keep: Tensor | None = None, **call: Any) -> Tensor:
        """Like transformers' layer, but of positions in `logits_to_keep` where it is given."""
        own: Any = self
        call = {"attention_mask": None} | call  # transformers' own forward hands one in
        mixed, _ = own.self_attn(hidden_states=own.input_layernorm(hidden_states), **call)
        hidden = hidden_states + mixed
        if logits_to_keep is not None:
            hidden = hidden.index_select(1, logits_to_keep)
        return hidden + own.mlp(own.post_attention_layernorm(hidden))


def compile_layers(layers: nn.ModuleList) -> None:
    """Compile the decoder layers in place. The first steps take a minute longer; numbers change by rounding."""
    dynamo.allow_unspec_int_on_nn_module = True  # a layer's number would make it a graph of its own
    for layer in layers:
        layer.compile(dynamic=True)
