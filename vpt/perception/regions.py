"""Regions: a box in pixels <-> cells of a k x k grid <-> region tokens <-> a crop (paper section 3.2).

A box becomes cells by the cells of its top-left and bottom-right pixels; cells become the pixels they cover.
Boxes are (x0, y0, x1, y1) in pixels, x1 and y1 exclusive when they come from cells.
"""

import re
from dataclasses import dataclass

from vpt.perception.tokens import REGION_END, REGION_START

Box = tuple[float, float, float, float]
_CORNER = r"<\|x_(\d{1,4})\|><\|y_(\d{1,4})\|>"
_REGION = re.compile(re.escape(REGION_START) + 2 * _CORNER + re.escape(REGION_END))
_NUMBERS = re.compile(r"\[(\d{1,4}), ?(\d{1,4}), ?(\d{1,4}), ?(\d{1,4})\]")


@dataclass(frozen=True)
class Region:
    """Cells of a grid over an image, corners included: columns x0..x1, rows y0..y1."""

    x0: int
    y0: int
    x1: int
    y1: int

    @classmethod
    def from_box(cls, box: Box, size: tuple[int, int], *, bins: int) -> "Region":
        """Cells of `box` in an image of `size` (width, height). Raises ValueError where the box leaves the image."""
        (x0, y0, x1, y1), (width, height) = box, size
        if not (0 <= x0 < x1 <= width and 0 <= y0 < y1 <= height):
            raise ValueError(f"box {list(box)} does not lie inside its image of {width}x{height} pixels (x0,y0,x1,y1)")

        def cell(pixel: float, extent: int) -> int:
            return min(int(pixel * bins / extent), bins - 1)

        return cls(cell(x0, width), cell(y0, height), cell(x1, width), cell(y1, height))

    @classmethod
    def find(cls, text: str, *, numbers: bool = False) -> "list[tuple[re.Match[str], Region]]":
        """Every well-formed run of region tokens in `text`, or every `[x0, y0, x1, y1]`. Swapped corners are put in
        order."""
        matches = (_NUMBERS if numbers else _REGION).finditer(text)
        return [(match, cls._ordered(*map(int, match.groups()))) for match in matches]

    @classmethod
    def _ordered(cls, a: int, b: int, c: int, d: int) -> "Region":
        return cls(min(a, c), min(b, d), max(a, c), max(b, d))

    def to_text(self) -> str:
        """The six region tokens that name these cells."""
        return f"{REGION_START}<|x_{self.x0}|><|y_{self.y0}|><|x_{self.x1}|><|y_{self.y1}|>{REGION_END}"

    def to_numbers(self) -> str:
        """The cells as text: `[x0, y0, x1, y1]`, column and row of the first and of the last cell."""
        return f"[{self.x0}, {self.y0}, {self.x1}, {self.y1}]"

    def to_box(self, size: tuple[int, int], *, bins: int, margin: int = 0) -> tuple[int, int, int, int]:
        """The pixels these cells cover in an image of `size`, widened by `margin` cells on each side."""
        width, height = size
        x0, y0 = max(self.x0 - margin, 0), max(self.y0 - margin, 0)
        x1, y1 = min(self.x1 + 1 + margin, bins), min(self.y1 + 1 + margin, bins)
        left, top = x0 * width // bins, y0 * height // bins
        return left, top, max(x1 * width // bins, left + 1), max(y1 * height // bins, top + 1)


def in_numbers(text: str) -> str:
    """`text` with every run of region tokens as numbers (`model.region_format: text`)."""
    return _REGION.sub(lambda run: Region(*map(int, run.groups())).to_numbers(), text)
