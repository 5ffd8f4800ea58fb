"""Features of frozen encoders on disk: an image is encoded once, by whichever run or process comes first.

An entry is a file named by a digest of the image file's bytes, of all that is done to the image on its way to the
encoder, and of the encoder: its weights, its configuration, the precision it runs in. Trained encoders have no entries.
Data workers look entries up and then neither open nor transform the image; the model writes what it had to compute.
Any number of processes may share a folder. An entry appears whole or not at all, and the least recently used ones go
once the folder is full.
"""

import os
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vpt.data.images import MediaStore
from vpt.data.references import ImageRef, Reference
from vpt.data.transforms import ImageTransform, ProcessedImage
from vpt.errors import DataError
from vpt.perception.batch import Grid, ImageInputs
from vpt.utils.files import atomic_file

FORMAT = "4"  # of the entries, and of how their names are made
SUFFIX = ".safetensors"
STALE_SECONDS = 3600  # seconds after which an unfinished file has been given up by its writer
PRUNE_FRACTION = 1 / 16  # the folder is measured once a process has written this share of its limit
MAX_PENDING = 64  # entries that may wait to be written; further ones are not kept


@dataclass
class FeatureCache:
    """A folder of features. Data workers carry it; it opens nothing until it is used.

    Attributes:
        root: the folder.
        limit: bytes that it may hold; processes that write together may pass it by a sixteenth each.
        fingerprints: transform -> digest of the frozen encoder behind it. Other transforms have no entries.
    """

    root: Path
    limit: int
    fingerprints: dict[str, str]
    _unmeasured: float = inf  # bytes written since the folder was last measured; at first it never was
    _waiting: int = 0
    _broken: bool = False
    _writer: ThreadPoolExecutor | None = field(default=None, repr=False)

    def key(self, transform: ImageTransform, reference: Reference, media: MediaStore) -> str | None:
        """The name of an image's entry; None where there can be none, or where the image cannot be read."""
        if transform.name not in self.fingerprints or type(reference) is not ImageRef:  # a video, or token-matched
            return None
        try:
            content = media.file(reference, "").read()
        except (OSError, DataError):
            return None  # opening the image will say what is wrong
        done = (FORMAT, self.fingerprints[transform.name], transform.description, reference.crop, reference.transpose,
                reference.size, media.max_side, media.crop_max_side, media.resample, media.sizing,
                media.apply_exif_rotation)  # fmt: skip
        return blake2b(repr(done).encode() + content, digest_size=20).hexdigest()

    def get(self, key: str) -> ProcessedImage | None:
        """The entry as a processed image without pixels, or None. An entry that cannot be read is removed."""
        path = self._path(key)
        try:
            with safe_open(path, "pt") as entry:
                about: dict[str, str] = entry.metadata()
                features = entry.get_tensor("features")
            grid = [int(number) for number in about["grid"].split(",") if number]
            os.utime(path)  # the time of its last use
        except (FileNotFoundError, RuntimeError):  # the latter where another process removes it while it is opened
            return None
        except (SafetensorError, KeyError, ValueError, OSError):
            path.unlink(missing_ok=True)
            return None
        shape = (grid[0], grid[1], grid[2]) if grid else None
        return ProcessedImage(torch.empty(0), int(about["tokens"]), shape, features=features)

    def put(self, images: ImageInputs, features: Tensor) -> None:
        """Write the features of the images among `images.pixels`, [positions, feature_dim], on any device."""
        for number, (key, own) in enumerate(zip(images.cache_keys, images.split(features), strict=True)):
            if key is not None:
                grid = images.grids[number] if images.grids else None
                self._submit(key, own, images.uncached[number], grid)

    def _submit(self, key: str, features: Tensor, tokens: int, grid: Grid | None) -> None:
        """Write an entry while the caller goes on."""
        if self._broken or self._waiting >= MAX_PENDING:
            return
        self._waiting += 1
        if self._writer is None:
            self._writer = ThreadPoolExecutor(1, thread_name_prefix="features")
        about = {"tokens": str(tokens), "grid": ",".join(map(str, grid or ()))}
        self._writer.submit(self._write, self._path(key), features.detach(), about)

    def flush(self) -> None:
        """Wait until everything is written."""
        if self._writer is not None:
            self._writer.shutdown()
            self._writer = None

    def _path(self, key: str) -> Path:
        return self.root / key[:2] / f"{key}{SUFFIX}"

    def _write(self, path: Path, features: Tensor, about: Mapping[str, str]) -> None:
        self._waiting -= 1
        if self._broken or path.exists():
            return
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as draft:
                save_file({"features": features.cpu().contiguous()}, draft, dict(about))
        except (OSError, SafetensorError) as error:  # a full disk must not end a run
            print(f"features are not kept: {error}", flush=True)
            self._broken = True
            return
        self._unmeasured += features.nbytes
        if self._unmeasured > self.limit * PRUNE_FRACTION:
            self._prune()

    def _prune(self) -> None:
        """Remove what was used least recently, and what was never finished, until the folder keeps its limit."""
        entries = []
        for path in self.root.glob("*/*"):
            with suppress(FileNotFoundError):  # another process prunes too
                about = path.stat()
                if path.suffix == SUFFIX:
                    entries.append((about.st_mtime, about.st_size, path))
                elif about.st_mtime < time.time() - STALE_SECONDS:
                    path.unlink()
        held = sum(size for _, size, _ in entries)
        for _, size, path in sorted(entries):
            if held <= self.limit:
                break
            path.unlink(missing_ok=True)
            held -= size
        self._unmeasured = 0

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_writer": None}  # threads stay where they are
