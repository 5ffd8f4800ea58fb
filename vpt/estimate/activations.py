"""What a forward pass keeps for the backward pass, by formula, in bytes."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

from torch import nn

from vpt.estimate.gpus import FLOAT32
from vpt.estimate.workload import Workload
from vpt.models.vpt import VPTModel, is_trained

BFLOAT16 = 2


@dataclass(frozen=True)
class DTypeBytes:
    """Bytes of numbers: `stored` in weights, and so between layers; in `products`.

    `packed`: whether attention runs packed, as on a GPU in half precision, or padded (`vpt.models.attention`).
    """

    stored: int
    products: int
    packed: bool

    @classmethod
    def of(cls, model: VPTModel, *, autocast: bool, on_gpu: bool) -> "DTypeBytes":
        """Bytes a number of a model takes.

        Args:
            autocast: bf16 products whatever is stored (`training.precision=bf16`).
            on_gpu: where attention runs packed in half precision.
        """
        stored: int = model.language.embed_tokens.weight.element_size()
        products = BFLOAT16 if autocast else stored
        return cls(stored, products, packed=on_gpu and products == BFLOAT16)


def kept_by_layer(layer: Any, load: Workload, types: DTypeBytes, *, read: float) -> float:
    """Bytes that one of transformers' decoder layers keeps for its backward pass, its MLP of `read` positions.

    Of a stream D wide, queries H, keys and values K wide, an MLP I wide; p bytes in products, s in the stream:

        two norms      their input in float32, and normalised, where their weight is trained: 2 D (4 + s); those of
                       queries and keys, where there are any, likewise: (H + K) (4 + p)
        matrices       their input, where they or their adapters are trained, cast once for each where the stream is
                       wider than products: 2 D s, or 5 D p; adapters of rank r also keep r p
        attention      queries and output 2 H p; of each key that a segment sees, 2 K p; padded calls expand them to
                       the query heads, 2 H p, and keep a mask of p for each pair
        MLP            gate, its activation, the other half, and where the last matrix is trained their product: 4 I p
    """
    attention, mlp, p, s = layer.self_attn, layer.mlp, types.products, types.stored
    width, inner, query = attention.q_proj.in_features, mlp.gate_proj.out_features, attention.q_proj.out_features

    def fed(norm: nn.Module, *matrices: nn.Module) -> int:
        trained = [is_trained(matrix) for matrix in matrices]
        inputs = any(trained) * s if s == p else sum(trained) * p
        return width * (FLOAT32 + s * is_trained(norm) + inputs)

    mixed = fed(layer.input_layernorm, attention.q_proj, attention.k_proj, attention.v_proj)
    mixed += p * (2 * query + _ranks(attention))
    for norm, matrix in ((getattr(attention, f"{x}_norm", None), getattr(attention, f"{x}_proj")) for x in "qk"):
        mixed += 0 if norm is None else matrix.out_features * (FLOAT32 + p * is_trained(norm))
    gated = fed(layer.post_attention_layernorm, mlp.gate_proj, mlp.up_proj)
    gated += p * ((3 + is_trained(mlp.down_proj)) * inner + _ranks(mlp))
    seen = 2 * attention.k_proj.out_features if types.packed else 2 * query
    pairs = 0 if types.packed else load.masked * p
    return load.positions * mixed + read * gated + load.keys * seen * p + pairs


def _ranks(module: nn.Module) -> int:
    return sum(matrix.out_features for name, matrix in module.named_modules() if name.endswith("lora_A.default"))


def cached_by_layer(layer: Any, types: DTypeBytes) -> int:
    """Bytes of a position's key, as the rotary embedding leaves it, and value."""
    attention = layer.self_attn
    return attention.k_proj.out_features * types.stored + attention.v_proj.out_features * types.products


def kept_activations(model: VPTModel, load: Workload, types: DTypeBytes) -> float:
    """Bytes that the decoder, projectors and a trained tower keep for the backward pass."""
    layers, width = model.language.layers, model.language.config.hidden_size
    one = kept_by_layer(layers[0], load, types, read=load.positions)
    kept = load.asked * width * (FLOAT32 + types.stored)  # the last norm
    kept += load.positions * 2 * layers[0].self_attn.head_dim * FLOAT32  # cosines and sines
    if model.forward_config.checkpointing:
        kept += len(layers) * load.positions * (width * types.stored + cached_by_layer(layers[0], types))
        kept += one * load.max_grad_stage / max(load.positions, 1.0)
    else:
        kept += (len(layers) - 1) * one + kept_by_layer(layers[-1], load, types, read=load.asked)
    kept += types.stored * sum(
        tokens * (2 * model.encoder(name).projector.linear_feature.in_features + 3 * width)
        for name, tokens in load.perceived.items()
    )
    if is_trained(model.tower):
        widths = sum(m.in_features + m.out_features for m in matrices(model.tower.blocks))
        kept += load.patches * types.products * widths
    return kept


def matrices(module: nn.Module) -> Iterable[nn.Linear]:
    """Every linear layer of a module."""
    return (layer for layer in module.modules() if isinstance(layer, nn.Linear))
