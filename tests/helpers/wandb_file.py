"""Reading back what W&B has written for a run without a network: records (protobuf) in a log of LevelDB's format."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import wandb
from wandb.proto.wandb_internal_pb2 import Record

_BLOCK, _OPENING, _HEADER = 32768, 7, 7  # bytes: of a block, before the first record, before each piece of one


def records(folder: Path) -> Iterator[Record]:
    """Everything in the .wandb files of a run's folder, oldest file first."""
    for file in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        data = file.read_bytes()
        assert data[:4] == b":W&B"
        at, pieces = _OPENING, b""
        while at + _HEADER <= len(data):
            if _BLOCK - at % _BLOCK < _HEADER:  # what is left of a block is padding
                at += _BLOCK - at % _BLOCK
                continue
            length, kind = int.from_bytes(data[at + 4 : at + 6], "little"), data[at + 6]
            pieces += data[at + _HEADER : at + _HEADER + length]
            at += _HEADER + length
            if kind in (1, 4):  # whole, or the last piece
                yield Record.FromString(pieces)
                pieces = b""


def read(folder: Path) -> dict[str, Any]:
    """`history` as logged, `metrics` with their axes, `config`, and the `ids` of the run."""
    wandb.teardown()  # what is still on its way to the disk
    found: dict[str, Any] = {"history": [], "metrics": {}, "config": {}, "ids": [], "summary": {}}
    for record in records(folder):
        kind = record.WhichOneof("record_type")
        if kind == "history":
            items = record.history.item
            found["history"].append(
                {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
            )
        elif kind == "metric":
            metric = record.metric
            best = [name for name in ("min", "max") if getattr(metric.summary, name)]
            found["metrics"][metric.name or metric.glob_name] = (metric.step_metric, *best)
        elif kind == "run":
            found["ids"].append(record.run.run_id)
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            found["config"] |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "summary":
            found["summary"] |= {item.key: item.value_json for item in record.summary.update}
    return found
