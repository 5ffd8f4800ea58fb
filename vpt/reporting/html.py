"""Self-contained pages from jinja2 templates: in light and dark, on any width, with no outside resource."""

import base64
import io
import re
import warnings
from collections.abc import Sequence
from typing import Any

import matplotlib
from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure
from PIL import Image

INK = "#010203"  # figures draw in it what the page is to draw in its own text colour
_TEMPLATES = Environment(
    loader=PackageLoader("vpt.reporting"), autoescape=True, undefined=StrictUndefined, trim_blocks=True
)
fragments: Any = _TEMPLATES.get_template("fragments.html").module  # its macros; texts that they are given are escaped


def page(title: str, sections: Sequence[tuple[str, Markup]], *, lead: str = "", top: Markup | None = None) -> str:
    """A whole page of sections (heading, HTML), with links to each at the top; `top` is HTML above them."""
    return _TEMPLATES.get_template("page.html").render(title=title, sections=sections, lead=lead, top=top or "")


def figure(drawn: Figure, *, width: int | None = None) -> Markup:
    """A matplotlib figure as a drawing inside the page, `width` pixels at the most.

    What is drawn in `INK` takes the page's own text colour; `theme` draws all texts and axes in it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "page"}), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph")  # the reader's own fonts are used
        drawn.savefig(buffer, format="svg", transparent=True, metadata={"Date": None})
    text = buffer.getvalue()
    svg = text[text.index("<svg") :].replace(INK, "var(--ink)")
    used = set(re.findall(r'(?:url\(|href=")#([\w-]+)', svg))
    svg = re.sub(r' id="([^"]+)"', lambda match: match[0] if match[1] in used else "", svg)  # pages have many figures
    return fragments.figure(Markup(svg), width=width)


def theme() -> dict[Any, Any]:
    """Settings of matplotlib for figures of a page."""
    inked = ("text.color", "axes.edgecolor", "axes.labelcolor", "xtick.color", "ytick.color", "axes.titlecolor")
    return {**dict.fromkeys(inked, INK), "text.parse_math": False, "axes.spines.top": False, "axes.spines.right": False,
            "grid.color": "#888888", "grid.alpha": 0.3, "legend.framealpha": 0.0, "axes.titlesize": 10,
            "axes.labelsize": 9, "xtick.labelsize": 8, "ytick.labelsize": 8}  # fmt: skip


def picture(image: Image.Image, caption: str = "") -> Markup:
    """An image inside the page: small ones with sharp pixels, large ones as JPEG."""
    buffer, kind = io.BytesIO(), "png" if max(image.size) <= 96 else "jpeg"
    if kind == "png":
        image.save(buffer, format="png", optimize=True)
    else:
        image.convert("RGB").save(buffer, format="jpeg", quality=88)
    data = base64.b64encode(buffer.getvalue()).decode()
    return fragments.figure(fragments.image(kind, data, caption), caption)
