"""Texts."""

import re
from collections.abc import Sequence


def until(text: str, stops: Sequence[str]) -> str:
    """The text up to the first of the texts that end it, without white space around it; an empty one ends nothing."""
    ends = "|".join(re.escape(stop) for stop in stops if stop)
    return re.split(ends, text, maxsplit=1)[0].strip() if ends else text.strip()
