"""Records to samples, where some records may be broken."""

from collections.abc import Sequence
from typing import Literal

from vpt.data.images import MediaStore
from vpt.data.samples import Processor, Sample
from vpt.data.sources import Source
from vpt.errors import DataError

# What becomes of a record that cannot be used: `data.on_error`
OnError = Literal["raise", "skip"]


def encode_samples(
    rows: Sequence[tuple[Source, int, MediaStore]], encoder: Processor, on_error: OnError
) -> tuple[list[Sample | None], list[str]]:
    """A sample for each record, None where it is skipped; and why those are."""
    samples: list[Sample | None] = []
    errors = []
    for source, index, folder in rows:
        try:
            samples.append(encoder.encode_conversation(source[index], folder))
        except DataError as error:
            if on_error == "raise":
                raise
            samples.append(None)
            errors.append(str(error))
    return samples, errors
