"""Letters of any script are drawn where a font has them, and said to be missing where none has."""

import warnings
from io import BytesIO

from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.figure import Figure
from matplotlib.font_manager import fontManager

from vpt.utils.drawing import NOTE, save, use_installed_fonts


def font_of(letters: str, path) -> None:
    """A font file with a square for each letter."""
    pen = TTGlyphPen(None)
    pen.moveTo((0, 0)), pen.lineTo((0, 900)), pen.lineTo((900, 900)), pen.lineTo((900, 0)), pen.closePath()
    names = [".notdef", *(f"u{ord(letter):X}" for letter in letters)]
    font = FontBuilder(1000)
    font.setupGlyphOrder(names)
    font.setupCharacterMap({ord(letter): name for letter, name in zip(letters, names[1:], strict=True)})
    font.setupGlyf(dict.fromkeys(names, pen.glyph()))
    font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
    font.setupHorizontalHeader(ascent=1000, descent=-200)
    font.setupNameTable({"familyName": "Squares", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(path)


def texts(figure: Figure) -> list[str]:
    return [text.get_text() for text in figure.texts]


def test_a_letter_is_drawn_by_a_font_that_has_it_or_said_to_be_missing(tmp_path, monkeypatch):
    font_of("\U000f0123", tmp_path / "squares.ttf")  # of the private use area: no other font has it
    figures = [Figure(figsize=(3, 1), layout="constrained") for _ in range(3)]
    for figure in figures:
        figure.text(0, 0.5, "ä \U000f0123 \U000f0124 $x$", parse_math=False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        save(figures[0], BytesIO())
        assert texts(figures[0]) == ["ä □ □ $x$", NOTE]
        monkeypatch.setattr(fontManager, "ttflist", [*fontManager.ttflist])
        fontManager.addfont(tmp_path / "squares.ttf")
        assert use_installed_fonts(figures[1]) == {"\U000f0124"}
        assert texts(figures[1]) == ["ä \U000f0123 □ $x$"] and figures[1].texts[0].get_fontfamily() == [
            "DejaVu Sans",
            "Squares",
        ]
        save(figures[1], BytesIO())
        figures[2].texts[0].set_text("äöü")
        save(figures[2], BytesIO())
        assert texts(figures[2]) == ["äöü"]
