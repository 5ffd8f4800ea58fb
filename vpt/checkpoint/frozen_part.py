"""Frozen tensors that came from one folder: what a checkpoint says of them, and where they are now."""

import json
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from vpt.checkpoint.checksums import sha256
from vpt.checkpoint.hub import is_hub_name
from vpt.checkpoint.pretrained import Place, StoredWeights
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict, weight_files
from vpt.errors import CheckpointError, wrap_read_errors
from vpt.models.lora import plain_name
from vpt.models.qwen import local_folder
from vpt.models.vpt import VPTModel

FROZEN = "frozen_weights.json"


@dataclass(frozen=True)
class FrozenPart:
    """Frozen tensors that came from one folder.

    Attributes:
        key: what named the folder: `model.path`, `encoder.X.path`.
        path: what that key held, a folder or a hub's name.
        folder: where it is.
        places: name in the model -> where in the folder's files.
        files: SHA-256 of each file; still to come while a thread reads them.
    """

    key: str
    path: str
    folder: Path
    places: Mapping[str, Place]
    files: Future[dict[str, str]]

    @classmethod
    def of(cls, model: VPTModel, stored: StoredWeights, path: str) -> "FrozenPart":
        """The tensors of a new model that are as `stored` and stay so: no trained one, no table that has grown."""
        assert isinstance(stored.tensors, LazyStateDict)
        trained = {name for name, tensor in model.state_dict(keep_vars=True).items() if tensor.requires_grad}
        shapes = stored.tensors.shapes
        places = {
            name: stored.places[plain]
            for name, tensor in unique_state_dict(model).items()
            if name.startswith(stored.prefix) and name not in trained and (plain := plain_name(name)) in stored.places
            and stored.places[plain].shape(shapes) == list(tensor.shape)
        }  # fmt: skip
        return cls(stored.key, path, stored.tensors.folder.absolute(), places, Future())

    @classmethod
    def parse(cls, key: str, stored: Any) -> "FrozenPart":
        """An entry of `frozen_weights.json`. Raises ValueError, TypeError or KeyError for anything else."""
        files: Future[dict[str, str]] = Future()
        files.set_result({str(name): str(checksum) for name, checksum in stored["files"].items()})
        if not all(Path(name).name == name for name in files.result()):
            raise ValueError(f"{key} names a file outside of its folder")
        places = {
            str(name): Place(str(at), int(part), int(parts)) for name, (at, part, parts) in stored["tensors"].items()
        }
        return cls(key, str(stored["path"]), Path(stored["folder"]), places, files)

    def candidates(self, given: Mapping[str, str], *, strict: bool) -> Iterator["FrozenPart"]:
        """This part in each folder that may hold it, best first: the one `given` now, the recorded one, a hub's copy.

        strict: another one that is given is the only one.
        """
        now = given.get(self.key, self.path)
        moved = now if now != self.path else None
        for path in filter(None, (moved,) if strict and moved else (moved, str(self.folder), self.path)):
            named = path if path == moved else self.path
            if Path(path).is_dir():
                yield replace(self, path=named, folder=Path(path).absolute())
            elif is_hub_name(path):
                yield replace(self, path=named, folder=local_folder(path, self.key, weights=True))

    @property
    def what_to_type(self) -> str:
        """Where the folder is not what it was."""
        return f"type {self.key}=FOLDER, one with the files as they were"

    def hash_files(self) -> None:
        """Read the files of a new run; whoever asks for `files` is told of an error."""
        try:
            self.files.set_result({file.name: _sha256_once(file) for file in weight_files(self.folder)})
        except Exception as error:
            self.files.set_exception(error)

    def mismatch(self, *, rank: int = 0, ranks: int = 1) -> str:
        """The first file that is missing or has changed, or "". Each of several ranks reads its share."""
        for name, checksum in sorted(self.files.result().items())[rank::ranks]:
            file = self.folder / name
            if not file.is_file():
                return f"{file} is missing"
            if (found := _sha256_once(file)) != checksum:
                return f"{file} has changed (SHA-256 {found[:12]}... instead of {checksum[:12]}...)"
        return ""

    def located(self, checkpoint: Path, given: Mapping[str, str], *, strict: bool) -> "FrozenPart":
        """This part with the folder that holds it now. Raises CheckpointError where there is none."""
        there = [*self.candidates(given, strict=strict)]
        if not there:
            raise CheckpointError(
                f"{checkpoint} names the frozen weights of {self.key} instead of holding them, and "
                f"{given.get(self.key, self.folder)} is not there; type {self.key}=NEW_PLACE, a folder with these "
                f"files: {', '.join(sorted(self.files.result()))}"
            )
        if len(there) == 1 or strict:
            return there[0]
        return next((part for part in there if not part.mismatch()), there[0])


def read_parts(checkpoint: Path) -> list[FrozenPart]:
    """The entries of a checkpoint's `frozen_weights.json`, if any. Raises CheckpointError where it is broken."""
    file = checkpoint / FROZEN
    if not file.is_file():
        return []
    with wrap_read_errors(file, "copy the checkpoint again, or use an older one"):
        return [FrozenPart.parse(key, entry) for key, entry in json.loads(file.read_text(encoding="utf-8")).items()]


def _sha256_once(file: Path) -> str:
    """The checksum of a file, read once by a process as long as nobody writes to it."""
    status = file.stat()
    return _sha256_of(file.resolve(), status.st_size, status.st_mtime_ns)


@cache
def _sha256_of(file: Path, size: int, modified: int) -> str:
    return sha256(file)
