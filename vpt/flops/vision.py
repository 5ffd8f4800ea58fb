"""FLOPs of images: the visual tower by formula, re-encoders and their projectors as torch counts them."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vpt.encoders.base import ReEncoder
from vpt.flops.cost import FlopCost, LayerStack, receivers
from vpt.models.vision_tower import VisionTower
from vpt.models.vpt import is_trained
from vpt.perception.batch import Grid


class TowerCost:
    """The visual tower over images of any size."""

    def __init__(self, tower: VisionTower) -> None:
        visual: Any = tower
        self.config, self.family = visual.config, visual.family
        self.merge = self.config.spatial_merge_size
        blocks = list(visual.blocks)
        full = self.family.whole_blocks(self.config)
        embedded = is_trained(visual.patch_embed)
        needed = receivers(blocks, carries=embedded)
        width = visual.patch_embed.proj.out_channels

        def stack(chosen: list[int]) -> LayerStack:
            return LayerStack([blocks[i] for i in chosen], [needed[i] for i in chosen], width=width)

        self.embedding = LayerStack([visual.patch_embed], [False])
        self.whole = stack([i for i in range(len(blocks)) if i in full])
        self.windowed = stack([i for i in range(len(blocks)) if i not in full])
        mergers = [visual.merger, *self.family.deep_mergers(visual).values()]
        self.merger = LayerStack(mergers, [is_trained(visual)] * len(mergers))

    def cost(self, grids: Sequence[Grid]) -> FlopCost:
        """FLOPs of encoding images or videos, (t, h, w) in patches."""
        patches = sum(t * h * w for t, h, w in grids)
        frames = sum(t * (h * w) ** 2 for t, h, w in grids)
        return (
            self.embedding.cost(patches)
            + self.whole.cost(patches, frames)
            + self.windowed.cost(patches, sum(map(self._windowed_pairs, grids)))
            + self.merger.cost(patches // self.merge**2)
        )

    def _windowed_pairs(self, grid: Grid) -> int:
        windows = self.family.windows(self.config, grid)
        return sum(length**2 for length in windows[1]) if windows else 0


class EncoderCost:
    """Costs of a re-encoder: of an image in its encoder and its projector, and of the direction that conditions it.

    Attributes:
        vision, project, condition: those costs; where the features are the tower's, `project` is of one token.
        tokens: that an image becomes; 1 where `project` is of one token.
        tokens_carry, condition_carries: whether unconditioned tokens, and what is added to them, carry a gradient.
    """

    def __init__(self, encoder: ReEncoder, hidden_size: int, *, tower_trained: bool) -> None:
        self.vision, self.tokens = FlopCost(), 1
        features = torch.empty(1, hidden_size, device="meta", requires_grad=tower_trained)
        if encoder.vision is not None:
            look = encoder.transform(Image.new("RGB", (64, 64)))
            self.tokens = look.tokens
            self.vision, features = _count(encoder, lambda module, x: module.forward_features(x), look.pixels[None])
        projector = encoder.projector
        self.project, tokens = _count(projector, lambda module, x: module.project(x), features)
        scale = projector.layernorm_condition.normalized_shape[0] // hidden_size
        states = torch.empty(1, scale, hidden_size, device="meta", requires_grad=True)
        self.condition, _ = _count(projector, lambda module, x: module.condition_vector(x), states)
        self.tokens_carry = tokens.requires_grad
        self.condition_carries = is_trained(projector.layernorm_condition) or is_trained(projector.linear_condition)


class _Call(nn.Module):
    """A method of a module as a module's forward."""

    def __init__(self, module: nn.Module, method: Callable[..., Tensor]) -> None:
        super().__init__()
        self.module, self.method = module, method

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.method(self.module, *inputs)


def _count(module: nn.Module, method: Callable[..., Tensor], given: Tensor) -> tuple[FlopCost, Tensor]:
    """The cost of a call as torch counts it, and what it returns, on the meta device; the module stays as it is."""
    call = _Call(module, method)
    tensors = {name: _meta(tensor) for name, tensor in (*call.named_parameters(), *call.named_buffers())}
    given = _meta(given)
    with sdpa_kernel(SDPBackend.MATH):  # the one that is made of countable products
        with FlopCounterMode(display=False) as forward:
            out = functional_call(call, tensors, (given,))
        with FlopCounterMode(display=False) as backward:
            if out.requires_grad:
                out.sum().backward()
    linear, attention = split_counts(forward)
    return FlopCost(linear, attention, backward=sum(split_counts(backward))), _meta(out)


def _meta(tensor: Tensor) -> Tensor:
    dtype = torch.float32 if tensor.is_floating_point() else tensor.dtype
    return torch.empty(tensor.shape, dtype=dtype, device="meta", requires_grad=tensor.requires_grad)


def split_counts(counter: FlopCounterMode) -> tuple[int, int]:
    """FLOPs as torch counted them: products with weights, products of activations (attention)."""
    counts = {str(operation): count for operation, count in counter.get_flop_counts().get("Global", {}).items()}
    attention = sum(count for name, count in counts.items() if "bmm" in name or "attention" in name)
    return sum(counts.values()) - attention, attention
