"""Qwen2.5-VL: most blocks of its tower attend within windows, and its video positions count time."""

from collections.abc import Container
from functools import lru_cache
from typing import Any

import torch
from transformers import Qwen2_5_VLConfig

from vpt.models.families.base import Family, Windows
from vpt.perception.batch import Grid


class Qwen2_5VL(Family):
    """Windows in the tower, seconds in positions."""

    name, title, config_class = "qwen2_5_vl", "Qwen2.5-VL", Qwen2_5_VLConfig
    processor_class = "Qwen2_5_VLProcessor"

    def windows(self, vision: Any, grid: Grid) -> Windows:
        side = vision.window_size // vision.spatial_merge_size // vision.patch_size
        return _window_order(grid, vision.spatial_merge_size, side)

    def whole_blocks(self, vision: Any) -> Container[int]:
        blocks: list[int] = vision.fullatt_block_indexes
        return blocks

    def tokens_per_second(self, vision: Any) -> float:
        return float(vision.tokens_per_second)


@lru_cache(maxsize=4096)
def _window_order(grid: Grid, merge: int, window: int) -> Windows:
    """Order of the merged positions of one image by windows of `window` x `window`, and patches in each window."""
    frames, height, width = grid[0], grid[1] // merge, grid[2] // merge
    index = torch.arange(frames * height * width).view(frames, height, width)
    cells = [
        index[t, top : top + window, left : left + window].flatten()
        for t in range(frames)
        for top in range(0, height, window)
        for left in range(0, width, window)
    ]
    return torch.cat(cells), tuple(len(cell) * merge * merge for cell in cells)
