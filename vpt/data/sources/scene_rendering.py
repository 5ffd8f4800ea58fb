"""Drawing a scene: textured canvas, handwritten digits, coloured frames. A scene is described first, then drawn."""

from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
from PIL import Image, ImageDraw

from vpt.data.images import transposed
from vpt.data.records import Pixels

COLOURS = {
    "red": (225, 20, 30), "blue": (25, 60, 235), "green": (10, 170, 40), "yellow": (240, 215, 10),
    "pink": (240, 60, 200), "cyan": (20, 205, 220),
}  # fmt: skip
TILE, TILES = 1024, 8  # pixels along a tile's side, tiles of a bank
_DARK, _LIGHT = 15, 240  # ink


@dataclass(frozen=True)
class Glyph:
    """One handwritten digit: `image` is its number among the digits of its split, `box` the square that it fills."""

    image: int
    value: int
    box: Pixels
    dark: bool


@dataclass(frozen=True)
class Frame:
    """A square ring of `width` pixels; `box` is its outer edge. One with gaps is drawn by `strokes`, filled boxes."""

    colour: str
    box: Pixels
    width: int
    strokes: tuple[Pixels, ...] = ()


@dataclass(frozen=True)
class Background:
    """Where a canvas is cut out of which tile, and how it is turned."""

    tile: int
    left: int
    top: int
    turn: int


@dataclass(frozen=True)
class Scene:
    """Everything that is to be seen on a square canvas of `side` pixels."""

    side: int
    ground: Background
    glyphs: tuple[Glyph, ...] = field(default=())
    frames: tuple[Frame, ...] = field(default=())


def render_scene(scene: Scene, digits: np.ndarray, tiles: tuple[Image.Image, ...]) -> Image.Image:
    """The scene in RGB.

    Args:
        scene: what to draw.
        digits: [n, 8, 8] handwritten digits, 0 to 255, that `Glyph.image` counts.
        tiles: a bank of textures (`texture_bank`).
    """
    ground = scene.ground
    window = (ground.left, ground.top, ground.left + scene.side, ground.top + scene.side)
    canvas = transposed(tiles[ground.tile].crop(window), ground.turn)
    pen = ImageDraw.Draw(canvas)
    for frame in scene.frames:
        colour, (x0, y0, x1, y1) = COLOURS[frame.colour], frame.box
        if not frame.strokes:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), outline=colour, width=frame.width)
        for x0, y0, x1, y1 in frame.strokes:
            pen.rectangle((x0, y0, x1 - 1, y1 - 1), fill=colour)
    for glyph in scene.glyphs:
        x0, y0, x1, y1 = glyph.box
        mask = Image.fromarray(digits[glyph.image]).resize((x1 - x0, y1 - y0), Image.Resampling.BICUBIC)
        canvas.paste((_DARK if glyph.dark else _LIGHT,) * 3, glyph.box, mask)
    return canvas


@lru_cache(maxsize=8)
def texture_bank(*key: int, contrast: float, brightness: tuple[float, float]) -> tuple[Image.Image, ...]:
    """Tiles of clouds, weave and grain in muted colours, the same for the same key.

    Args:
        key: numbers that seed it.
        contrast: standard deviation of the brightness, in grey levels.
        brightness: least and greatest mean of a tile, in grey levels.
    """
    return tuple(_tile(np.random.default_rng((*key, number)), contrast, brightness) for number in range(TILES))


def _tile(generator: np.random.Generator, contrast: float, mean: tuple[float, float]) -> Image.Image:
    clouds = sum(_noise(generator, cells) * weight for cells, weight in ((8, 1.0), (32, 0.7), (128, 0.5)))
    grain = _noise(generator, TILE) * generator.uniform(0.2, 1.0)
    brightness = clouds + grain + _weave(generator) * max(generator.uniform(-1, 1.5), 0)
    brightness *= contrast / brightness.std()
    tint = np.stack([_noise(generator, 8) for _ in range(3)], axis=-1) * contrast / 3
    base = generator.uniform(*mean) + generator.uniform(-15, 15, size=3)
    pixels = base + brightness[..., None] + tint
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8))


def _noise(generator: np.random.Generator, cells: int) -> np.ndarray:
    """[TILE, TILE] of smooth noise, `cells` independent values along a side."""
    values = Image.fromarray(generator.standard_normal((cells, cells), dtype=np.float32))
    return np.asarray(values.resize((TILE, TILE), Image.Resampling.BICUBIC))


def _weave(generator: np.random.Generator) -> np.ndarray:
    """[TILE, TILE] of two crossing waves, about as fine as the strokes of a digit."""
    y, x = np.mgrid[:TILE, :TILE].astype(np.float32)
    angle, period = generator.uniform(0, np.pi), generator.uniform(6, 24)
    u, v = x * np.cos(angle) + y * np.sin(angle), y * np.cos(angle) - x * np.sin(angle)
    return np.sin(u * (2 * np.pi / period)) + np.sin(v * (2 * np.pi / period))
