"""Self-contained pages: text, tables, and pictures inside the file."""

import base64
import io
from collections.abc import Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 1180px; padding: 0 1em; color: #1b1f24 }
h1 { font-size: 1.5em } h2 { margin-top: 2em; border-bottom: 1px solid #d6dbe1; padding-bottom: .2em }
table { border-collapse: collapse; margin: .8em 0 } td, th { padding: .25em .8em; text-align: left }
tr:nth-child(even) { background: #f4f6f8 } th { border-bottom: 2px solid #d6dbe1 }
td.number { text-align: right; font-variant-numeric: tabular-nums }
.panels { display: flex; flex-wrap: wrap; gap: 1em } .panels figure { margin: 0; flex: 1 1 340px; max-width: 560px }
img { max-width: 100% } figcaption { color: #57606a; font-size: .9em }
nav a { margin-right: 1em }
"""


def page(title: str, sections: Sequence[tuple[str, str]], *, lead: str = "") -> str:
    """A whole page of sections (heading, HTML), with links to each at the top."""
    links = " ".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "\n".join(f'<h2 id="s{i}">{escape(heading)}</h2>\n{html}' for i, (heading, html) in enumerate(sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n<nav>{links}</nav>\n"
        f"{body}\n</body></html>\n"
    )


def table(header: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    """A table; numbers stand at the right."""
    head = "".join(f"<th>{escape(cell)}</th>" for cell in header)
    lines = ("".join(_cell(cell) for cell in row) for row in rows)
    return f"<table><tr>{head}</tr>\n" + "\n".join(f"<tr>{line}</tr>" for line in lines) + "</table>"


def _cell(value: object) -> str:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    text = f"{value:,.4g}" if isinstance(value, float) else str(value)
    return f'<td class="number">{text}</td>' if number else f"<td>{escape(text)}</td>"


def figure(drawn: "Figure", caption: str = "") -> str:
    """A matplotlib figure as a picture inside the page; the figure is closed."""
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    drawn.savefig(buffer, format="png", dpi=110)
    plt.close(drawn)
    return _picture(buffer.getvalue(), caption)


def picture(path: Path, caption: str = "") -> str:
    """A PNG file inside the page."""
    return _picture(path.read_bytes(), caption)


def _picture(png: bytes, caption: str) -> str:
    data = base64.b64encode(png).decode()
    alt = escape(caption, quote=True)
    shown = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f'<figure><img alt="{alt}" src="data:image/png;base64,{data}">{shown}</figure>'


def panels(pictures: Iterable[str]) -> str:
    """Pictures side by side, as many as fit."""
    return f'<div class="panels">{"".join(pictures)}</div>'
