"""One table in three forms: text for the console, HTML for a report, a `wandb.Table`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from jinja2 import Environment
from markupsafe import Markup
from PIL.Image import Image

_HTML = Environment(autoescape=True, trim_blocks=True).from_string("""<div class="wide"><table>
<tr>{% for name, kind in columns %}<th{% if kind %} class="{{ kind }}"{% endif %}>{{ name }}</th>{% endfor %}</tr>
{% for row in rows %}
<tr>{% for (_, kind), cell in row %}<td{% if kind %} class="{{ kind }}"{% endif %}>{{ cell }}</td>{% endfor %}</tr>
{% endfor %}
</table></div>
""")


class Range(NamedTuple):
    """A cell with the ends of an interval; two columns at W&B."""

    low: float
    high: float


@dataclass(frozen=True)
class Table:
    """Named columns and rows of cells: text, a number, a `Range`, an image, None, or a drawing (`Markup`, HTML only).

    `formats` holds format specifications of columns, for their floats and ranges.
    """

    columns: Sequence[str]
    rows: Sequence[Sequence[Any]]
    formats: Mapping[str, str] = field(default_factory=dict)

    def insert(self, place: int, column: str, cells: Sequence[Any]) -> "Table":
        """The table with one more column."""
        columns = [*self.columns[:place], column, *self.columns[place:]]
        rows = [[*row[:place], cell, *row[place:]] for row, cell in zip(self.rows, cells, strict=True)]
        return replace(self, columns=columns, rows=rows)

    def as_text(self) -> str:
        """Lines of aligned columns, the first with their names."""
        lines = [
            list(self.columns),
            *([self._text(place, row[place]) for place in self._places()] for row in self.rows),
        ]
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        numeric = ["number" in self._kind(place) for place in self._places()]
        return "\n".join(
            "  ".join(
                cell.rjust(width) if number else cell.ljust(width)
                for cell, width, number in zip(line, widths, numeric, strict=True)
            ).rstrip()
            for line in lines
        )

    def as_html(self) -> Markup:
        """A `<table>` inside a `<div>` that scrolls; texts are escaped."""
        columns = [(name, self._kind(place)) for place, name in enumerate(self.columns)]
        rows = [zip(columns, [self._text(n, cell) for n, cell in enumerate(row)], strict=True) for row in self.rows]
        return Markup(_HTML.render(columns=columns, rows=rows))

    def as_wandb(self) -> Any:
        """A `wandb.Table` with unformatted numbers."""
        import wandb

        columns: list[str | int] = []
        for place, name in enumerate(self.columns):
            columns += ["low", "high"] if self._kind(place) == "interval" else [name]
        return wandb.Table(columns=columns, data=[self._wandb_row(row) for row in self.rows])

    def _wandb_row(self, row: Sequence[Any]) -> list[Any]:
        import wandb

        cells: list[Any] = []
        for place, cell in enumerate(row):
            if self._kind(place) == "interval":
                cells += cell if isinstance(cell, Range) else (None, None)
            else:
                cells.append(wandb.Image(cell) if isinstance(cell, Image) else cell)
        return cells

    def _places(self) -> range:
        return range(len(self.columns))

    def _kind(self, place: int) -> str:
        """CSS class of a column: `number`, `interval` or none."""
        cells = [row[place] for row in self.rows if row[place] is not None]
        if any(isinstance(cell, Range) for cell in cells):
            return "interval"
        return "number" if cells and all(type(cell) in (int, float) for cell in cells) else ""

    def _text(self, place: int, cell: Any) -> str:
        form = self.formats.get(self.columns[place], ",.4g")
        if cell is None:
            return "-"
        if isinstance(cell, Range):
            return f"{cell.low:{form}} to {cell.high:{form}}"
        if isinstance(cell, float):
            return f"{cell:{form}}"
        return f"{cell:,}" if type(cell) is int else cell if isinstance(cell, str) else str(cell)
