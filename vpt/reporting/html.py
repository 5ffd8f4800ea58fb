"""Self-contained pages: text, tables, drawings and pictures inside the file, in light and dark, on any width."""

import base64
import io
import re
from collections.abc import Iterable, Sequence
from html import escape
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

INK = "#010203"  # figures draw in it what the page is to draw in its own text colour
# Nothing runs and nothing is fetched, whatever the texts hold.
_POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
_STYLE = """
:root { color-scheme: light dark; --ink: #1b1f24; --soft: #57606a; --paper: #fff; --card: #f6f8fa; --line: #d6dbe1;
  --good: #1b7f3b; --bad: #c0392b; --accent: #2f6fb2; --region: #e8590c; --true: #0b8f7a }
@media (prefers-color-scheme: dark) { :root { --ink: #e4e8ec; --soft: #9aa4af; --paper: #14181d; --card: #1d232a;
  --line: #343c46; --good: #4cc476; --bad: #ff7b6b; --accent: #6cabe8; --region: #ff8a45; --true: #3ad1b8 } }
* { box-sizing: border-box }
body { font: 15px/1.5 system-ui, sans-serif; margin: 0 auto; max-width: 1180px; padding: 1.2em 1em 4em;
  color: var(--ink); background: var(--paper); overflow-wrap: break-word }
h1 { font-size: 1.5em; margin: .4em 0 }
h2 { margin: 2.2em 0 .6em; border-bottom: 1px solid var(--line); font-size: 1.2em }
h3 { font-size: 1em; margin: 1.6em 0 .3em } p { max-width: 48em } .note { color: var(--soft); font-size: .92em }
nav { margin: 1em 0 } nav a { margin-right: 1em; white-space: nowrap } a { color: var(--accent) }
.wide { overflow-x: auto; margin: .8em 0 } table { border-collapse: collapse }
td, th { padding: .25em .8em; text-align: left; vertical-align: middle } td.number, th.number { text-align: right }
tr:nth-child(even) td { background: var(--card) } th { border-bottom: 2px solid var(--line); font-weight: 600 }
td.number, td.interval { white-space: nowrap }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap }
.tiles { display: flex; flex-wrap: wrap; gap: .7em; margin: 1em 0 }
.tile { background: var(--card); border-radius: 8px; padding: .6em 1em } .tile b { display: block; font-size: 1.45em }
.tile span { color: var(--soft); font-size: .88em }
.panels { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 340px), 1fr)); gap: 1em }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 330px), 1fr)); gap: .9em }
.card { background: var(--card); border-radius: 8px; padding: .8em .9em; min-width: 0 } .card p { margin: .35em 0 }
.card .looks { display: flex; flex-wrap: wrap; gap: .5em; align-items: flex-start; margin: .5em 0 }
.card .looks figure { flex: 1 1 130px; min-width: 0 } .card .looks figure:first-child { flex-basis: 170px }
.card code { font-size: .82em; color: var(--soft) } .right { color: var(--good) } .wrong { color: var(--bad) }
figure { margin: 0; max-width: 640px } img { max-width: 100%; width: 100%; border-radius: 3px; display: block }
img.pixels { image-rendering: pixelated } figcaption { color: var(--soft); font-size: .84em }
svg { width: 100%; height: auto; display: block } svg text { font-family: system-ui, sans-serif !important }
details > summary { cursor: pointer } pre { overflow-x: auto; font-size: .85em }
"""


def page(title: str, sections: Sequence[tuple[str, str]], *, lead: str = "", top: str = "") -> str:
    """A whole page of sections (heading, HTML), with links to each at the top; `top` is HTML above them."""
    links = " ".join(f'<a href="#s{i}">{escape(heading)}</a>' for i, (heading, _) in enumerate(sections))
    body = "\n".join(f'<h2 id="s{i}">{escape(heading)}</h2>\n{html}' for i, (heading, html) in enumerate(sections))
    return (
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<style>{_STYLE}</style></head>\n<body><h1>{escape(title)}</h1>\n<p>{escape(lead)}</p>\n{top}\n"
        f"<nav>{links}</nav>\n{body}\n</body></html>\n"
    )


def figure(drawn: "Figure", caption: str = "") -> str:
    """A matplotlib figure as a drawing inside the page; the figure is closed.

    What is drawn in `INK` takes the page's own text colour; `theme` draws all texts and axes in it.
    """
    import matplotlib
    from matplotlib import pyplot as plt

    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}):
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    plt.close(drawn)
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace(INK, "var(--ink)")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)  # pages have many figures
    return _captioned(svg, caption)


def theme() -> dict[Any, Any]:
    """Settings of matplotlib for figures of a page."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {**dict.fromkeys(inked, INK), "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
            "grid.color": "#888888", "grid.alpha": 0.3, "legend.framealpha": 0.0, "axes.titlesize": 10,
            "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}  # fmt: skip


def picture(image: Image.Image, caption: str = "") -> str:
    """An image inside the page: small ones with sharp pixels, large ones as JPEG."""
    small, buffer = max(image.size) <= 96, io.BytesIO()
    if small:
        image.save(buffer, format="png", optimize=True)
    else:
        image.convert("RGB").save(buffer, format="jpeg", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    kind, style = ("png", ' class="pixels"') if small else ("jpeg", "")
    return _captioned(f'<img{style} alt="{escape(caption)}" src="data:image/{kind};base64,{data}">', caption)


def _captioned(drawn: str, caption: str) -> str:
    shown = f"<figcaption>{escape(caption)}</figcaption>" if caption else ""
    return f"<figure>{drawn}{shown}</figure>"


def panels(pictures: Iterable[str]) -> str:
    """Pictures side by side, as many as fit."""
    return f'<div class="panels">{"".join(pictures)}</div>'


def tiles(pairs: Iterable[tuple[str, str]]) -> str:
    """Tiles side by side: a large text and what it is."""
    shown = (f'<div class="tile"><b>{escape(value)}</b><span>{escape(what)}</span></div>' for what, value in pairs)
    return f'<div class="tiles">{"".join(shown)}</div>'


def folded(heading: str, html: str) -> str:
    """HTML that shows once its heading is clicked."""
    return f"<details><summary>{escape(heading)}</summary>{html}</details>"
