"""Which M-RoPE positions the tokens of an image or a video take."""

import math
from dataclasses import dataclass

import numpy as np

from vpt.data.transforms import ProcessedImage
from vpt.perception.batch import VISION_TOWER, PlaceholderSpan
from vpt.perception.mrope import GridSpan, PositionKind, ReencodedPositions


@dataclass(frozen=True)
class PositionScheme:
    """How positions are counted.

    Attributes:
        positions: `model.positions`.
        reencoded: `model.reencoded_positions`.
        merge: the tower's `spatial_merge_size`.
        tokens_per_second: positions that a second of video takes (Qwen2.5-VL); None: a step of its grid takes one.
    """

    positions: PositionKind = "mrope"
    reencoded: ReencodedPositions = "sequential"
    merge: int = 2
    tokens_per_second: float | None = None

    def grid_span(self, block: PlaceholderSpan, image: ProcessedImage) -> GridSpan | None:
        """The grid that a block's positions follow, or None where it counts as text."""
        if self.positions == "sequential" or (block.source != VISION_TOWER and self.reencoded == "sequential"):
            return None
        rows, columns = self.grid_shape(image)
        return GridSpan(block.start, block.length // (rows * columns), rows, columns, self._interval(image))

    def grid_shape(self, image: ProcessedImage) -> tuple[int, int]:
        """Rows and columns of the grid that an image's tokens form."""
        if image.grid is not None:
            return image.grid[1] // self.merge, image.grid[2] // self.merge
        side = math.isqrt(image.tokens // image.frames)
        return side, side

    def _interval(self, image: ProcessedImage) -> float:
        """Positions from one step of the grid to the next, rounded as transformers does: its seconds are float32."""
        if image.seconds is None or self.tokens_per_second is None:
            return 1.0
        return float(np.float32(self.tokens_per_second) * np.float32(image.seconds))
