"""VPT records in JSON (one list) or JSONL files, below `data.root`."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from vpt.data.records import Record, parse_record
from vpt.data.sources import Source, SourceContext
from vpt.errors import DataError
from vpt.tokens import action_tokens


class RecordFile(Source):
    """One file of records; image paths start from `images`, or else from `data.root`."""

    def __init__(self, context: SourceContext, *, path: str, images: str = "", reencode_as: str | None = None) -> None:
        """Args:
        path: the file, below `data.root`.
        images: folder of the images, below `data.root`.
        reencode_as: the re-encoder that serves every re-encoding turn, whichever the file names; by default the
            one it names, or the model's only one.
        """
        if context.root is None:
            raise DataError("data.root is not set; type data.root=FOLDER, the folder that holds the record files")
        self.context, self.root = context, context.root / images
        self.path = context.root / path
        if not self.path.is_file():
            raise DataError(f"record file {self.path} does not exist; check data.root={context.root}")
        self._serving = reencode_as
        self._raws = _read_json(self.path) if self.path.suffix == ".json" else _read_lines(self.path)
        if not self._raws:
            raise DataError(f"{self.path} holds no records")

    def __len__(self) -> int:
        return len(self._raws)

    def __getitem__(self, index: int) -> Record:
        where, raw = self._raws[index]
        raw = _retarget(raw, self.context.encoder_tokens, self._serving)
        if self.context.perception:
            return parse_record(raw, where=where, encoder_tokens=self.context.encoder_tokens)
        tokens = dict(self.context.encoder_tokens) or _tokens_named_in(raw)
        return parse_record(raw, where=where, encoder_tokens=tokens).without_perception()


def _read_json(path: Path) -> list[tuple[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise DataError(f"{path} must hold a list of records, not {type(records).__name__}; or name it .jsonl")
    return [(f"{path}: record {number}", record) for number, record in enumerate(records)]


def _read_lines(path: Path) -> list[tuple[str, Any]]:
    records = []
    try:
        for number, line in enumerate(path.open(encoding="utf-8"), start=1):
            if line.strip():
                records.append((f"{path}:{number}", json.loads(line)))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DataError(f"{path}:{number}: not valid JSON: {error}") from None
    return records


def _tokens_named_in(raw: dict[str, Any]) -> dict[str, str]:
    """Spellings of the re-encoders that a record names, for a model that has none of them."""
    keys = [key.removesuffix("_images") for key in raw if key.endswith("_images") and raw[key]]
    return {key: key for key in keys}


def _retarget(raw: Any, encoder_tokens: Mapping[str, str], serving: str | None) -> Any:
    """Let one re-encoder serve the turns that a file wrote for another.

    A file written for DINO (`<detection_image>`) trains a SAM model with `reencode_as=sam`, or by itself where the
    model has a single re-encoder.
    """
    named = _tokens_named_in(raw) if isinstance(raw, dict) else {}
    target = encoder_tokens.get(serving) if serving else next(iter(encoder_tokens.values()), None)
    if len(named) != 1 or target is None or (not serving and len(encoder_tokens) > 1) or target in named:
        return raw
    (written,) = named

    def respell(text: Any) -> Any:
        if not isinstance(text, str):
            return text
        for old, new in zip(action_tokens(written), action_tokens(target), strict=True):
            text = text.replace(old, new)
        return text.replace(f"<{written}_image>", f"<{target}_image>")

    messages = [{**m, "content": respell(m.get("content"))} if isinstance(m, dict) else m for m in raw["messages"]]
    return {**raw, "messages": messages, f"{written}_images": [], f"{target}_images": raw[f"{written}_images"]}
