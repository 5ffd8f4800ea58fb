"""VPT records in JSON (one list), JSONL or Parquet files, below `data.root`."""

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import replace
from itertools import accumulate
from pathlib import Path
from typing import Any

from vpt.data.rebin import rebin
from vpt.data.record_store import RecordStore
from vpt.data.records import PLACEHOLDER, Record, check_shape, parse_record
from vpt.data.sources.base import Source, SourceContext
from vpt.errors import DataError, did_you_mean, shortened
from vpt.perception.tokens import action_tokens


class RecordFile(Source):
    """Files of records; image paths start from `images`, or else from `data.root`."""

    def __init__(
        self, context: SourceContext, *, path: str | Sequence[str], images: str = "", first: int | None = None,
        reencode_as: str | None = None,
    ) -> None:  # fmt: skip
        """Args:
        path: the file below `data.root`, or several, one after the other.
        images: folder of the images, or a tar file that holds them, below `data.root`.
        first: leave out all records but the first so many.
        reencode_as: the re-encoder that serves the re-encoding turns of a record, whichever it names; by default the
            one it names, or the model's only one. Records that name several are refused.
        """
        self.check(context.root, path=path, images=images)
        if first is not None and first < 1:
            raise ValueError(f"first={first} leaves no record; it must be 1 or more")
        if reencode_as is not None and reencode_as not in context.encoder_tokens:
            known = [*context.encoder_tokens]
            raise ValueError(
                f"reencode_as={reencode_as} is no re-encoder of this model, which has {', '.join(known) or 'none'}"
                f"{did_you_mean(reencode_as, known)}"
            )
        root = context.root or Path()
        self.context, self.root = context, root / images
        self._media, self._serving = context.media(self.root), reencode_as
        self._stores = [RecordStore(root / name, name) for name in _listed(path)]
        self._ends = list(accumulate(len(store) for store in self._stores))
        self._count = self._ends[-1] if first is None else min(first, self._ends[-1])

    @classmethod
    def check(cls, root: Path | None, *, path: str | Sequence[str], images: str = "", **_: Any) -> None:
        if root is None:
            raise DataError("data.root is not set; type data.root=FOLDER, the folder that holds the record files")
        place = _below(root, images)
        if not place.is_dir() and not (place.suffix == ".tar" and place.is_file()):
            raise DataError(f"folder of images {place} does not exist; check data.root={root}")
        for name in _listed(path):
            if not _below(root, name).is_file():
                raise DataError(f"record file {root / name} does not exist; check data.root={root}")

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, index: int) -> Record:
        record, raw, context = self._parsed(index)
        perceives = context.perception or context.token_matched_images
        record = record if perceives else context.apply_run_options(record)  # the grid of what goes does not matter
        record = rebin(
            record, context.encoder_tokens, self._media, bins=context.region_bins,
            source_bins=_whole_number(raw, "region_bins", record.where, default=8, least=1),  # published files lack it
            crop_margin=_whole_number(raw, "crop_margin", record.where, default=0, least=0),
        )  # fmt: skip
        return context.apply_run_options(record) if perceives else record

    def draft(self, index: int) -> Record:
        record, _, context = self._parsed(index)
        return context.apply_run_options(record)

    def _parsed(self, index: int) -> tuple[Record, Any, SourceContext]:
        """A record as its file has it, its JSON, and the context with the re-encoders that it may name."""
        file = bisect_right(self._ends, index)
        where, raw = self._stores[file][index - self._ends[file]]  # from the end of the file
        context = self.context
        check_shape(raw, where)
        raw = _retarget(raw, where, context.encoder_tokens, self._serving)
        if not context.perception and not context.token_matched_images:  # whatever it names goes
            context = replace(context, encoder_tokens=_tokens_named_in(raw))
        return parse_record(raw, where=where, encoder_tokens=context.encoder_tokens), raw, context


def _below(root: Path, name: str) -> Path:
    path = root / name
    if not path.resolve().is_relative_to(root.resolve()):
        raise DataError(f"{path} leaves data.root={root}; give paths below it, and copy what a link points to")
    return path


def _listed(path: str | Sequence[str]) -> Sequence[str]:
    return [path] if isinstance(path, str) else path


def _whole_number(raw: Any, key: str, where: str, *, default: int, least: int) -> int:
    value = default if raw.get(key) is None else raw[key]  # Parquet has a null where other files have no key
    if type(value) is not int or value < least:
        raise DataError(f"{where}: `{key}` must be a whole number from {least} up, not {shortened(str(value))}")
    return value


def _tokens_named_in(raw: Any) -> dict[str, str]:
    """Spellings of the re-encoders that a record's placeholders name, also of those that the model lacks."""
    texts = [turn.get("content") for turn in raw["messages"] if isinstance(turn, dict) and turn.get("role") == "user"]
    return {
        match[1]: match[1]
        for text in texts if isinstance(text, str) for match in PLACEHOLDER.finditer(text) if match[1]
    }  # fmt: skip


def _retarget(raw: Any, where: str, encoder_tokens: Mapping[str, str], serving: str | None) -> Any:
    """Let one re-encoder serve the turns that a file wrote for another.

    A file written for DINO (`<detection_image>`) trains a SAM model with `reencode_as=sam`, or by itself where the
    model has a single re-encoder.
    """
    named = _tokens_named_in(raw)
    target = encoder_tokens[serving] if serving else next(iter(encoder_tokens.values()), None)
    if serving and len(named) > 1:
        raise DataError(
            f"{where}: reencode_as={serving} is for records that name one re-encoder, this one names "
            f"{', '.join(sorted(named))}; leave reencode_as out, or this record"
        )
    if len(named) != 1 or target is None or (not serving and len(encoder_tokens) > 1) or target in named:
        return raw
    (written,) = named

    def respell(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        for old, new in zip(action_tokens(written), action_tokens(target), strict=True):
            text = text.replace(old, new)
        return text.replace(f"<{written}_image>", f"<{target}_image>")

    if raw.get(f"{target}_images"):
        return raw  # the record's parser says that nothing asks for them
    messages = [{**m, "content": respell(m.get("content"))} if isinstance(m, dict) else m for m in raw["messages"]]
    return {**raw, "messages": messages, f"{written}_images": [], f"{target}_images": raw.get(f"{written}_images")}
