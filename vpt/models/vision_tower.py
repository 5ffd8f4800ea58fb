"""The visual tower over many images at once; where families differ, it asks its `Family`.

The modules and their weights are transformers' own, only `forward` is ours: theirs attends image by image (window by
window) in a Python loop and embeds patches with a 3-D convolution. Here equal-sized images and windows share one
attention call, and the patch embedding is the same weights as a matrix product.
"""

import math
from collections import defaultdict
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.models.families.base import Family, Windows
from vpt.perception.batch import Grid

MICRO_BATCH_PATCHES = (1024, 32768)  # patches that a frozen tower sees at a time, on a CPU and elsewhere


class AttentionGroups:
    """Runs of patches that attend among themselves, grouped by length: one attention call for each length."""

    def __init__(self, lengths: list[int], device: torch.device) -> None:
        starts: dict[int, list[int]] = defaultdict(list)
        offset = 0
        for length in lengths:
            starts[length].append(offset)
            offset += length
        self.single = next(iter(starts)) if len(starts) == 1 else None
        self.indices = [
            (length, (torch.tensor(begin)[:, None] + torch.arange(length)).flatten().to(device))
            for length, begin in starts.items()
        ]

    def attend(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """[N, heads, d] each; full attention inside every run. Returns [N, heads * d]."""
        if self.single is not None:
            return _attend(query, key, value, self.single)
        out = query.new_empty(query.shape[0], query.shape[1] * query.shape[2])
        for length, index in self.indices:
            out = out.index_copy(0, index, _attend(query[index], key[index], value[index], length))
        return out


def _attend(query: Tensor, key: Tensor, value: Tensor, length: int) -> Tensor:
    q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (query, key, value))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(0, 1).flatten(1)


@lru_cache(maxsize=4096)
def _patch_positions(grid: Grid, merge: int) -> Tensor:
    """Row and column of every patch, [t*h*w, 2], in the processor's order: merge x merge blocks, row by row."""
    frames, height, width = grid
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    blocks = [x.view(height // merge, merge, width // merge, merge).transpose(1, 2).flatten() for x in (rows, columns)]
    return torch.stack(blocks, dim=-1).repeat(frames, 1)


def _rope(grids: list[Grid], merge: int, head_dim: int, theta: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the 2-D rotary embedding, [patches, 1, 1, head_dim / 2]."""
    positions = torch.cat([_patch_positions(grid, merge) for grid in grids]).to(device)
    frequencies = 1.0 / theta ** (torch.arange(0, head_dim // 2, 2, device=device).float() / (head_dim // 2))
    angles = (positions[..., None] * frequencies).flatten(1)[:, None, None]
    return angles.cos(), angles.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Queries and keys in their positions' directions, [patches, 2, heads, head_dim]; computed in float32."""
    first, second = x.float().chunk(2, dim=-1)
    turned = (torch.addcmul(first * cos, second, sin, value=-1), torch.addcmul(second * cos, first, sin))
    return torch.cat(turned, dim=-1).to(x.dtype)


def _permute(x: Tensor, order: Tensor, unit: int) -> Tensor:
    return x.unflatten(0, (-1, unit))[order].flatten(0, 1)


class VisionTower(nn.Module):
    """The tower of a base model, made of the modules of transformers' tower, by the same names.

    Attributes:
        config: transformers' configuration of it.
        family: of the base model.
        transformers_tower: the tower that the modules come from; in a tuple, so that their weights have one owner.
    """

    def __init__(self, visual: Any, family: Family) -> None:
        """Take over the modules of `visual`, transformers' tower, which goes on working."""
        super().__init__()
        self.config, self.family, self.transformers_tower = visual.config, family, (visual,)
        for name, child in visual.named_children():
            self.add_module(name, child)
        self.training = visual.training

    def forward(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        """Image tokens of many images (or videos).

        Args:
            pixels: [patches, channels * temporal_patch * patch * patch], as the image processor makes them.
            grids: one (t, h, w) for each image, in patches.

        Returns:
            [sum of t * h * w / merge**2, (1 + k) * hidden]: the merged embeddings, image after image, and beside each
            the k deep features of a family that has them.
        """
        if torch.is_grad_enabled() or len(grids) == 1:
            return self._run(pixels, grids)
        # Nothing is kept for a backward pass: equal images go together, no more of them than caches hold well.
        patches = [math.prod(grid) for grid in grids]
        parts = pixels.split(patches)
        merged: list[Tensor] = [pixels] * len(grids)
        for chosen in _micro_batches(grids, limit=MICRO_BATCH_PATCHES[pixels.device.type != "cpu"]):
            out = self._run(torch.cat([parts[i] for i in chosen]), [grids[i] for i in chosen])
            lengths = [patches[i] // self.config.spatial_merge_size**2 for i in chosen]
            for number, part in zip(chosen, out.split(lengths), strict=True):
                merged[number] = part
        return torch.cat(merged)

    def _run(self, pixels: Tensor, grids: list[Grid]) -> Tensor:
        own: Any = self
        config, merge = self.config, self.config.spatial_merge_size
        embedding: Tensor = own.patch_embed.proj.weight
        # Under autocast the weight may be wider than the products; pixels follow the weight.
        hidden = F.linear(pixels.to(embedding.dtype), embedding.flatten(1), own.patch_embed.proj.bias)
        added = self.family.added_positions(self, grids)
        hidden = hidden if added is None else hidden + added.to(hidden.dtype)
        theta = (getattr(config, "rope_parameters", None) or {}).get("rope_theta", 10_000.0)
        cos, sin = _rope(grids, merge, own.blocks[0].attn.head_dim, theta, hidden.device)
        frames = [height * width for time, height, width in grids for _ in range(time)]
        whole = windowed = AttentionGroups(frames, hidden.device)
        windows = [w for grid in grids if (w := self.family.windows(config, grid)) is not None]
        order = None
        if windows:  # patches travel in window order between the embedding and the merger
            order, windowed = _by_window(windows, hidden.device)
            hidden, cos, sin = (_permute(x, order, merge * merge) for x in (hidden, cos, sin))
        whole_blocks, deep_mergers = self.family.whole_blocks(config), self.family.deep_mergers(self)
        deep = []
        for index, block in enumerate(own.blocks):
            groups = whole if index in whole_blocks else windowed
            hidden = _block(block, hidden, cos, sin, groups)
            if index in deep_mergers:
                deep.append(deep_mergers[index](hidden))
        merged = own.merger(hidden)
        merged = torch.cat([merged, *deep], dim=1) if deep else merged
        return merged if order is None else merged[torch.argsort(order)]


def _micro_batches(grids: list[Grid], *, limit: int) -> Iterator[list[int]]:
    """Numbers of images of about `limit` patches together, sorted by shape."""
    bundle: list[int] = []
    held = 0
    for number in sorted(range(len(grids)), key=lambda i: grids[i]):
        patches = math.prod(grids[number])
        if bundle and held + patches > limit:
            yield bundle
            bundle, held = [], 0
        bundle.append(number)
        held += patches
    yield bundle


def _block(block: Any, hidden: Tensor, cos: Tensor, sin: Tensor, groups: AttentionGroups) -> Tensor:
    attention = block.attn
    qkv = attention.qkv(block.norm1(hidden)).unflatten(-1, (3, -1, attention.head_dim))
    query, key = _rotate(qkv[:, :2], cos, sin).unbind(1)
    hidden = hidden + attention.proj(groups.attend(query, key, qkv[:, 2]))
    return hidden + block.mlp(block.norm2(hidden))


def _by_window(windows: list[Windows], device: torch.device) -> tuple[Tensor, AttentionGroups]:
    """The order of all images' merged positions, and the windows as attention groups."""
    orders: list[Tensor] = []
    offset = 0
    for order, _ in windows:
        orders.append(order + offset)
        offset += len(order)
    return torch.cat(orders).to(device), AttentionGroups([n for _, patches in windows for n in patches], device)
