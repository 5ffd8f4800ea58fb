"""Fields of the schema: choices, ranges, and the mark of a key that must be given."""

from dataclasses import field
from typing import Any

# omegaconf's mark of a key that has to be given; written out, so that the schema is read without it.
MISSING: Any = "???"


def choice(*options: str) -> Any:
    """A field that takes one of `options`, the first by default."""
    return field(default=options[0], metadata={"choices": options})


def optional_choice(*options: str) -> Any:
    """A field that takes one of `options`, or None, which is the default."""
    return field(default=None, metadata={"choices": options})


def bounded(default: float | int | None, *, low: float = 0, high: float = float("inf")) -> Any:
    """A number between `low` and `high`, both included; or None where its type has it."""
    return field(default=default, metadata={"range": (low, high)})
