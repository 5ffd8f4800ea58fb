"""Positions of a row's tokens: Qwen's multimodal rotary embedding (M-RoPE), one row at a time.

Text advances by one in all three components. An image that begins at position p has temporal p, vertical p + i and
horizontal p + j for its cell (i, j), and what follows begins at p + max(h, w). Step k of a video has temporal p + k in
Qwen2-VL; in Qwen2.5-VL temporal is time, p + floor(k * seconds per step * tokens per second); in Qwen3-VL each step
counts as an image. Re-encoded tokens count as text (`sequential`, as in upstream's models) or as an image (`grid`).

After a video, too, we go on at p + max(h, w), as transformers 5 does, whose logits ours must equal. transformers 4 and
Qwen's own code went on after the largest component: the same after images, later after a video whose last step lies
past max(h, w). While answering, positions go on from the last token, as in one forward over the whole text;
transformers' `generate` goes on from the largest position, which differs after such a video.
"""

from dataclasses import dataclass
from functools import lru_cache
from typing import Literal

import torch
from torch import Tensor

PositionKind = Literal["mrope", "sequential"]
ReencodedPositions = Literal["sequential", "grid"]


@dataclass(frozen=True)
class GridSpan:
    """Tokens [start, start + t*h*w) of a row that form a grid of t frames of h x w cells.

    `interval` is how far two frames lie apart in the temporal component, which is rounded down.
    """

    start: int
    frames: int
    height: int
    width: int
    interval: float = 1.0

    @property
    def length(self) -> int:
        """Number of tokens that the grid covers."""
        return self.frames * self.height * self.width

    def positions(self, origin: int) -> Tensor:
        """[3, length], the grid placed at position `origin`."""
        return _cells(self.frames, self.height, self.width, self.interval) + origin


@lru_cache(maxsize=4096)
def _cells(frames: int, height: int, width: int, interval: float) -> Tensor:
    time = (torch.arange(frames) * interval).long()
    axes = torch.meshgrid(time, torch.arange(height), torch.arange(width), indexing="ij")
    return torch.stack(axes).flatten(1)


def row_positions(length: int, grids: list[GridSpan], *, origin: int = 0) -> Tensor:
    """[3, length]: positions of a row, or of a turn that is appended to one and begins at `origin`."""
    parts: list[Tensor] = []
    cursor, position = 0, origin
    for grid in grids:
        parts.append(torch.arange(position, position + grid.start - cursor).expand(3, -1))
        position += grid.start - cursor
        parts.append(grid.positions(position))
        position += max(grid.height, grid.width)
        cursor = grid.start + grid.length
    parts.append(torch.arange(position, position + length - cursor).expand(3, -1))
    return torch.cat(parts, dim=1)
