"""Records that cannot be used: how many `data.on_error=skip` leaves out, and how they are told."""

import math
from collections.abc import Sequence

from vpt.errors import DataError, listed


def too_many(skipped: int, rows: int, share: float, *, complete: bool = False) -> bool:
    """Whether so many of the first `rows` records are more than `data.max_skipped_fraction` allows.

    Among few rows chance may put a broken one, or one more: the share is exceeded by three standard deviations, and by
    more than a single record. None at all is allowed by a share of 0, and all of several by none.

    Args:
        complete: there are no more rows than these; then the only one may not be skipped, either.
    """
    allowed = max(1.0, share * rows + 3 * math.sqrt(share * (1 - share) * rows)) if share else 0.0
    return skipped > allowed or (0 < skipped == rows and (complete or rows > 1))


def format_skipped(reasons: Sequence[str], rows: int, what: str) -> str:
    """How many of `rows` records cannot be used, with the first reasons, each on a line of its own."""
    separator = "\n    "
    return f"{len(reasons):,} of {rows:,} {what} cannot be used:{separator}{listed(reasons, separator=separator)}"


def check_skipped(reasons: Sequence[str], rows: int, share: float, *, what: str, complete: bool = False) -> None:
    """Raise DataError where so many are too many."""
    if too_many(len(reasons), rows, share, complete=complete):
        raise DataError(
            f"{format_skipped(reasons, rows, what)}\nthat is more than data.max_skipped_fraction={share} allows; mend "
            "or remove them, or allow more"
        )
