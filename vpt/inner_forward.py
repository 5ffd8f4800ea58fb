"""The walk: extend, read the control states, perceive, extend, ...

`extend` is the one operation of this project. Training walks over segments that come from the data; generation walks
over segments that come from the model (`vpt.generate`).
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from vpt.attention import Layout


class StageCache:
    """Keys and values of every stage so far, kept as they were computed so that gradients reach them.

    It has the `update` of transformers' caches: a layer hands in its own keys and gets back all of them.
    """

    def __init__(self) -> None:
        self.stages: list[dict[int, tuple[Tensor, Tensor]]] = []

    def open_stage(self) -> None:
        self.stages.append({})

    def update(self, key: Tensor, value: Tensor, layer: int, *_: object) -> tuple[Tensor, Tensor]:
        """[1, kv heads, N, d] each -> [1, kv heads, N of all stages, d]."""
        self.stages[-1][layer] = (key, value)
        if len(self.stages) == 1:
            return key, value
        pairs = [stage[layer] for stage in self.stages]
        return torch.cat([k for k, _ in pairs], dim=2), torch.cat([v for _, v in pairs], dim=2)


def extend(
    language: Any, cache: object, embeddings: Tensor, positions: Tensor, layout: Layout, *,
    checkpointing: bool = False,
) -> Tensor:  # fmt: skip
    """Run the decoder over packed embeddings, on top of what is cached.

    Args:
        language: transformers' text model of Qwen2-VL or Qwen2.5-VL (`layers`, `norm`, `rotary_emb`).
        cache: anything with `update(key, value, layer)`.
        embeddings: [N, D].
        positions: [3, N].
        layout: who attends to whom.
        checkpointing: recompute each layer in the backward pass instead of keeping its activations.

    Returns:
        [N, D], the final-normed hidden states.
    """
    hidden = embeddings[None]
    rope = language.rotary_emb(hidden, positions[:, None])
    for layer in language.layers:
        call = {"position_embeddings": rope, "past_key_values": cache, "layout": layout}
        hidden = checkpoint(layer, hidden, use_reentrant=False, **call) if checkpointing else layer(hidden, **call)
    return language.norm(hidden)[0]
