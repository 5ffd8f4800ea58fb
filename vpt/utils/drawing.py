"""Figures into files, each text in fonts that have its letters."""

from functools import cache
from pathlib import Path
from typing import IO

import matplotlib
from matplotlib.figure import Figure
from matplotlib.font_manager import findfont, fontManager
from matplotlib.ft2font import FT2Font
from matplotlib.text import Text

matplotlib.use("Agg")

USUAL = "DejaVu Sans"  # comes with matplotlib
NOTE = "□: letters that no installed font has; install one that does (such as Noto Sans CJK) and draw again"


def save(figure: Figure, to: Path | IO[bytes], *, dpi: int = 110) -> None:
    """Write a figure; where no installed font has a letter, □ stands for it and a line at the bottom says so."""
    if use_installed_fonts(figure):
        height = 0.22 / figure.get_figheight()
        if engine := figure.get_layout_engine():
            engine.set(rect=(0, height, 1, 1 - height))  # type: ignore[call-arg]  # of constrained layout
        figure.text(0.01, 0.2 * height, NOTE, fontsize=8, color="#777777")
    figure.savefig(to, dpi=dpi)


def use_installed_fonts(figure: Figure) -> set[str]:
    """Let texts use installed fonts for letters that matplotlib's own lacks. Letters that none has are replaced by □,
    and returned.
    """
    texts = [text for text in figure.findobj(Text) if isinstance(text, Text) and not text.get_text().isascii()]
    letters = {letter for text in texts for letter in text.get_text() if not letter.isspace()}
    missing, families = {letter for letter in letters if ord(letter) not in _has(findfont(USUAL))}, [USUAL]
    while missing:
        path, family = max(_installed(), key=lambda font: sum(ord(letter) in _has(font[0]) for letter in missing))
        rest = {letter for letter in missing if ord(letter) not in _has(path)}
        if rest == missing:
            break
        missing, families = rest, [*families, family]
    for text in texts:
        text.set_fontfamily(families)
        text.set_text("".join("□" if letter in missing else letter for letter in text.get_text()))
    return missing


def _installed() -> list[tuple[str, str]]:
    """Files and names of fonts; not the one whose every glyph is a placeholder."""
    return sorted((font.fname, font.name) for font in fontManager.ttflist if not font.name.startswith("Last Resort"))


@cache
def _has(path: str) -> frozenset[int]:
    """The letters of a font that can be drawn at any size."""
    try:
        font = FT2Font(path)
    except (OSError, RuntimeError):  # a file that is no font
        return frozenset()
    return frozenset(font.get_charmap()) if font.scalable else frozenset()
