"""FLOPs of matrices and of attention, by positions and pairs of a query and a key."""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import or_
from typing import Any

from torch import nn

from vpt.models.vpt import is_trained


@dataclass(frozen=True)
class FlopCost:
    """FLOPs: forward through matrices and through attention, backward, and forward again in the backward pass."""

    linear: float = 0.0
    attention: float = 0.0
    backward: float = 0.0
    recomputed: float = 0.0

    @property
    def forward(self) -> float:
        """One forward pass: matrices and attention."""
        return self.linear + self.attention

    @property
    def useful(self) -> float:
        """Forward and backward, without what is only computed again: the work that utilisation is measured by."""
        return self.forward + self.backward

    @property
    def total(self) -> float:
        """All FLOPs, recomputed ones included."""
        return self.useful + self.recomputed

    def __add__(self, other: "FlopCost") -> "FlopCost":
        return FlopCost(
            self.linear + other.linear, self.attention + other.attention, self.backward + other.backward,
            self.recomputed + other.recomputed,
        )  # fmt: skip

    def __mul__(self, factor: float) -> "FlopCost":
        return FlopCost(self.linear * factor, self.attention * factor, self.backward * factor, self.recomputed * factor)


class LayerStack:
    """Layers of one kind: what a position, and a pair of attention, costs in all of them together."""

    def __init__(
        self, layers: Sequence[nn.Module], receives: Sequence[bool], *, width: int = 0, ends: bool = True
    ) -> None:
        """Args:
        layers: any modules; all their matrices are applied to every position.
        receives: for each layer, whether gradients of what goes into its matrices are needed.
        width: h * d of a layer's attention.
        ends: whether recomputing stops with a layer's last product, which is not made again then.
        """
        self.matrices = self.backward = self.recompute = 0
        self.width, self.layers, self.needs_input_grad = width, len(layers), sum(receives)
        for layer, needed in zip(layers, receives, strict=True):
            weights = [module.weight for module in layer.modules() if isinstance(module, nn.Linear | nn.Conv3d)]
            size = sum(weight.numel() for weight in weights)
            self.matrices += size
            self.backward += sum(weight.numel() for weight in weights if weight.requires_grad) + needed * size
            self.recompute += needed * (size - ends * weights[-1].numel())

    def cost(self, positions: int, pairs: int = 0, *, again: bool = False) -> FlopCost:
        """`again`: whether the layers run once more in the backward pass."""
        pair = 4.0 * self.width * pairs
        return FlopCost(
            linear=2.0 * positions * self.matrices,
            attention=pair * self.layers,
            backward=2.0 * positions * self.backward + 2.0 * pair * self.needs_input_grad,
            recomputed=again * (2.0 * positions * self.recompute + pair * self.needs_input_grad),
        )


class DecoderCost:
    """Decoder layers over packed positions. The last one's MLP runs at some of them (`restrict_last_layer`)."""

    def __init__(self, layers: Sequence[Any], *, carries: bool) -> None:
        """`carries`: whether what goes into the first layer, or what it finds cached, carries a gradient."""
        needed = receivers(layers, carries=carries)
        width = layers[0].self_attn.q_proj.out_features
        *before, last = layers
        self.before = LayerStack(before, needed[:-1], width=width)
        self.mixing = LayerStack([last.self_attn], needed[-1:], width=width, ends=False)
        self.reading = LayerStack([last.mlp], needed[-1:])

    def cost(self, positions: int, outputs: int, pairs: int, *, again: bool) -> FlopCost:
        """Of a stage that returns `outputs` hidden states; `again`: whether layers run again in the backward pass."""
        mixing = self.before.cost(positions, pairs, again=again) + self.mixing.cost(positions, pairs, again=again)
        return mixing + self.reading.cost(outputs, again=again)


def receivers(layers: Sequence[nn.Module], *, carries: bool) -> list[bool]:
    """For each layer, whether it, or anything before it, is trained (`carries`: before the first one)."""
    return list(accumulate(map(is_trained, layers), or_, initial=carries))[1:]
