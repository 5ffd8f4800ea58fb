"""Frozen weights that came from a folder: a checkpoint names them by path and SHA-256 instead of holding them.

    frozen_weights.json     {"model.path": {"path": as the key had it, "folder": where that was found,
                            "files": {FILE: SHA-256}, "tensors": {NAME: [STORED NAME, part, parts]}}, ...}

A checkpoint without this file holds every tensor. Weights that are installed with the package are never named but
copied: they are small, and the next version of the package may bring others.
"""

import json
from collections.abc import Container, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

from torch import Tensor

from vpt.checkpoint.frozen_part import FROZEN, FrozenPart, read_parts
from vpt.checkpoint.pretrained import Place, StoredWeights
from vpt.checkpoint.tensors import LazyStateDict, LazyTensors
from vpt.config.weight_folder import ASSETS
from vpt.errors import CheckpointError
from vpt.models.vpt import VPTModel


class FrozenWeights(LazyTensors):
    """The tensors that a checkpoint names, by their names in the model; each is read when it is asked for."""

    def __init__(self, parts: Sequence[FrozenPart] = ()) -> None:
        self.parts = [part for part in parts if part.places]
        self._home: dict[str, tuple[LazyStateDict, Place]] = {}
        self.shapes: dict[str, list[int]] = {}
        for part in self.parts:
            opened = LazyStateDict(part.folder)
            if lacking := sorted({place.name for place in part.places.values()} - opened.keys()):
                raise CheckpointError(f"{part.folder} lacks {lacking[0]}; {part.what_to_type}")
            self._home |= {name: (opened, place) for name, place in part.places.items()}
            self.shapes |= {name: place.shape(opened.shapes) for name, place in part.places.items()}

    @classmethod
    def of(cls, model: VPTModel, stored: Sequence[StoredWeights], paths: Mapping[str, str]) -> "FrozenWeights":
        """Those of a new model, on any device, whose `requires_grad` are set.

        Args:
            model: before it is sharded.
            stored: what fills it.
            paths: key -> path of each folder, as configured.
        """
        parts = [FrozenPart.of(model, part, paths[part.key]) for part in stored]
        return cls([part for part in parts if not part.folder.is_relative_to(ASSETS)])

    @classmethod
    def named_by(
        cls, checkpoint: Path, given: Mapping[str, str] | None = None, *, strict: bool = False
    ) -> "FrozenWeights":
        """Those that a checkpoint names; none where it holds every tensor.

        Args:
            checkpoint: its folder.
            given: key -> path of folders that may have been moved there.
            strict: a path that is given is right or refused; else the recorded folder is looked at, too.

        Raises CheckpointError where a folder is not there. `check` compares the files.
        """
        return cls([part.located(checkpoint, given or {}, strict=strict) for part in read_parts(checkpoint)])

    def __getitem__(self, name: str) -> Tensor:
        tensors, place = self._home[name]
        return place.read(tensors)

    def without(self, names: Container[str]) -> "FrozenWeights":
        """All but some tensors."""
        kept = ({name: place for name, place in part.places.items() if name not in names} for part in self.parts)
        return FrozenWeights([replace(part, places=places) for part, places in zip(self.parts, kept, strict=True)])

    def source(self, name: str) -> tuple[Path, Place] | None:
        """Folder and place of a tensor; None for one that is not named."""
        found = self._home.get(name)
        return (found[0].folder.resolve(), found[1]) if found else None

    def mismatch(self, checkpoint: Path, *, rank: int = 0, ranks: int = 1) -> str:
        """What has changed since the checkpoint was written, and what to type, or ""."""
        for part in self.parts:
            if problem := part.mismatch(rank=rank, ranks=ranks):
                return f"{problem} since {checkpoint} was trained on it; {part.what_to_type}"
        return ""

    def check(self, checkpoint: Path) -> "FrozenWeights":
        """These. Raises CheckpointError where a file has changed."""
        if problem := self.mismatch(checkpoint):
            raise CheckpointError(problem)
        return self

    def start_hashing(self) -> None:
        """Begin to read the files of a new run in a thread, once; `save` waits for it."""
        pool = ThreadPoolExecutor(1, thread_name_prefix="sha256")
        for part in self.parts:
            if not part.files.done():
                pool.submit(part.hash_files)
        pool.shutdown(wait=False)

    def save(self, checkpoint: Path) -> None:
        """Write `frozen_weights.json`, where there is anything to name."""
        if self.parts:
            stored = {
                part.key: {
                    "path": part.path, "folder": str(part.folder), "files": part.files.result(), "tensors": part.places
                }
                for part in self.parts
            }  # fmt: skip
            (checkpoint / FROZEN).write_text(json.dumps(stored, indent=1), encoding="utf-8")


class CheckpointTensors(LazyTensors):
    """Every tensor of a checkpoint by name: those in its files, and those that it names."""

    def __init__(self, checkpoint: Path, frozen: FrozenWeights) -> None:
        self.held, self.frozen = LazyStateDict(checkpoint), frozen
        self.shapes = frozen.shapes | self.held.shapes

    def __getitem__(self, name: str) -> Tensor:
        return self.held[name] if name in self.held else self.frozen[name]
