"""Writing checkpoints while training goes on; `vpt.checkpoint.format` says what they hold.

The loop is held while tensors are copied to the CPU (and while an earlier checkpoint is still being written). A thread
then has every process write its share, after which rank 0 adds the small files, puts the folder in place, and drops
old ones. Whenever a run is killed, each folder named step_* is complete or was never there.
"""

import json
import os
import shutil
import time
import warnings
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
import transformers
from torch import Tensor
from torch.distributed.checkpoint import HuggingFaceStorageWriter
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.staging import DefaultStager, StagingOptions

from vpt.checkpoint.checksums import write_checksums
from vpt.checkpoint.format import BEST, COMPLETE, LATEST, STEP_FOLDER, list_checkpoints
from vpt.checkpoint.train_state import TrainState
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError
from vpt.utils.version import code_version

_WRITING, _DROPPING = ".writing_", ".dropping_"


class Saver:
    """Writes the checkpoints of a run, one at a time.

    As a context it ends once the last one is in place, and its thread and its process group are gone.
    """

    def __init__(self, folder: Path, world: World, *, keep: int) -> None:
        """`folder` is cleared of what killed processes left behind; `keep` checkpoints stay, besides the best one."""
        self.folder, self.world, self.keep = folder, world, keep
        self._group = dist.new_group(backend="gloo") if world.size > 1 else None  # apart from training's collectives
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: Future[None] | None = None
        if world.is_main:
            for left in (*folder.glob(f"{_WRITING}*"), *folder.glob(f"{_DROPPING}*")):
                shutil.rmtree(left)
        world.barrier()

    def save(
        self, tensors: Mapping[str, Mapping[str, Tensor]], state: TrainState, save_metadata: Callable[[Path], None]
    ) -> float:
        """Begin to write a checkpoint. Returns the seconds for which the caller was held.

        Args:
            tensors: file -> name -> tensor, whole or this process's part.
            state: goes into `state.json`.
            save_metadata: writes the small files into a folder; called by rank 0, in another thread.

        Raises CheckpointError where the checkpoint before could not be written.
        """
        started = time.perf_counter()
        self.wait()
        staged: Any = _stager().stage({file: dict(named) for file, named in tensors.items()})
        self._pending = self._thread.submit(self._write, staged, replace(state), save_metadata)
        return time.perf_counter() - started

    def wait(self) -> None:
        """Wait until the last checkpoint is in place. Raises CheckpointError where it could not be written."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        try:
            pending.result()
        except (CheckpointException, OSError) as error:
            raise CheckpointError(
                f"a checkpoint could not be written below {self.folder}: {_cause(error)}; the ones before are "
                "complete: make room and type the same command to go on from there"
            ) from None

    def link_best(self, state: TrainState) -> None:
        """Point `best` at the checkpoint of `state.best_step`, which was written before it was known to be that."""
        if self.world.is_main and (self.folder / STEP_FOLDER.format(state.best_step)).is_dir():
            _link(self.folder / BEST, STEP_FOLDER.format(state.best_step))

    def __enter__(self) -> "Saver":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        with suppress(CheckpointError) if kind else nullcontext():  # the user is told of the first error alone
            self.wait()
        self._thread.shutdown()
        if self._group is not None and kind is None:
            dist.destroy_process_group(self._group)

    def _write(
        self, staged: dict[str, dict[str, Tensor]], state: TrainState, save_metadata: Callable[[Path], None]
    ) -> None:
        draft = self.folder / f"{_WRITING}{STEP_FOLDER.format(state.step)}"
        try:
            for file, tensors in staged.items():
                writer = HuggingFaceStorageWriter(str(draft / file), save_distributed=True)
                dcp.save(tensors, storage_writer=writer, process_group=self._group, no_dist=self._group is None)
            if self.world.is_main:
                for file in staged:
                    _flatten(draft, file)
                save_metadata(draft)
                self._publish(draft, state)
        except BaseException:
            if self.world.is_main:
                shutil.rmtree(draft, ignore_errors=True)  # a full disk needs the room
            raise

    def _publish(self, draft: Path, state: TrainState) -> None:
        versions = {**code_version(), "torch": torch.__version__, "transformers": transformers.__version__}
        (draft / "state.json").write_text(json.dumps(asdict(state) | {"versions": versions}, indent=1))
        write_checksums(draft)
        for path in draft.rglob("*"):
            _sync(path)
        (draft / COMPLETE).touch()
        _sync(draft)
        target = self.folder / STEP_FOLDER.format(state.step)
        if target.exists():  # a copy that somebody broke off: it has no marker
            shutil.rmtree(target)
        draft.rename(target)
        _link(self.folder / LATEST, target.name)
        if state.best_step == state.step:
            _link(self.folder / BEST, target.name)
        _sync(self.folder)
        self._prune(state)

    def _prune(self, state: TrainState) -> None:
        best = STEP_FOLDER.format(state.best_step) if state.best_step is not None else None
        for old in list_checkpoints(self.folder)[: -self.keep]:
            if old.name != best:
                dropped = old.rename(old.with_name(f"{_DROPPING}{old.name}"))
                shutil.rmtree(dropped)


def _stager() -> DefaultStager:
    """What copies tensors to the CPU, for one checkpoint: before torch 2.13 a stager serves once."""
    on_gpu = torch.cuda.is_available()
    return DefaultStager(StagingOptions(
        use_pinned_memory=on_gpu, use_shared_memory=False, use_async_staging=False, use_non_blocking_copy=on_gpu
    ))  # fmt: skip


def _flatten(draft: Path, file: str) -> None:
    """Rename FILE/shard-... of every process to FILE.safetensors, or FILE-00001-of-00004.safetensors and so on."""
    parts = sorted((draft / file).glob("*.safetensors"))
    for number, part in enumerate(parts, start=1):
        numbered = "" if len(parts) == 1 else f"-{number:05d}-of-{len(parts):05d}"
        part.rename(draft / f"{file}{numbered}.safetensors")
    (draft / file).rmdir()


def _link(link: Path, target: str) -> None:
    """Make a link, or point it elsewhere at once: it never points at nothing."""
    draft = link.with_name(f".{link.name}")
    draft.unlink(missing_ok=True)
    draft.symlink_to(target, target_is_directory=True)
    draft.replace(link)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    os.fsync(handle)
    os.close(handle)


def _cause(error: BaseException) -> str:
    """The error message of the first process that failed."""
    if isinstance(error, CheckpointException):
        error = next(iter(error.failures.values()))[0]
    return str(error) or type(error).__name__
