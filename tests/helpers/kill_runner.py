"""A run, of one process or several, that is killed again and again, and what has to be left of it every time."""

import json
import os
import random
import resource
import signal
import time
from collections import Counter
from itertools import cycle
from pathlib import Path

import torch
from safetensors.torch import load_file

from conftest import compose_config
from helpers.multiprocess import PATIENCE, started
from vpt.checkpoint.format import BEST, COMPLETE, LATEST, find_checkpoint, list_checkpoints
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError
from vpt.training.trainer import Trainer

OVERRIDES = (
    "+experiment=free_choice", "+debug=two_steps", "training.batch_size=2", "training.checkpoint_every=1",
    "training.eval_every=3", "training.eval_rows=2", "data.limit=2",
)  # fmt: skip
FULL = 7  # exit code of an attempt that found the disk full and said so


def attempt(world: World, folder: str, steps: int, strategy: str, file_limit: int | None) -> None:
    """A process's part in a try at the run. `file_limit`: bytes that a file may have, for want of a disk that is full."""
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    config = compose_config(*OVERRIDES, f"training.steps={steps}", f"strategy={strategy}")
    try:
        Trainer(config, Path(folder), world).fit()
    except CheckpointError as error:
        os._exit(FULL if "make room" in str(error) else 1)
    except OSError:
        os._exit(FULL)


class KillRunner:
    """Starts a run again and again and kills it, until it has come to its end."""

    def __init__(self, folder: Path, *, steps: int, seed: int = 0, ranks: int = 1, strategy: str = "auto") -> None:
        self.folder, self.steps, self.seed, self.ranks, self.strategy = folder, steps, seed, ranks, strategy
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()
        everybody = list(range(ranks))
        self.victims = cycle([everybody] if ranks == 1 else [*([rank] for rank in everybody), everybody])

    def run(self, *, fates: list[str]) -> None:
        """One attempt for each fate, then as many as it takes."""
        for fate in fates:
            self.try_once(fate)
            self.check()
        while self.try_once("left alone"):
            pass

    def try_once(self, fate: str) -> bool:
        """Whether there was anything left to do."""
        before = self.last()
        if before == self.steps:
            return False
        limit = self.random.randrange(1000, self._largest_file()) if fate == "file limit" and before else None
        processes = started(
            self.ranks, attempt, str(self.folder), self.steps, self.strategy, limit, folder=self.folder.parent
        )  # fmt: skip
        if fate == "at any time":
            time.sleep(self.random.uniform(0, 6))
        elif fate == "after a step":
            self._wait(processes, lambda: self.last() > before)
            time.sleep(self.random.uniform(0, 0.5))
        elif fate == "while saving":
            self._wait(processes, lambda: self.last() > before and any(self._drafts()))
            time.sleep(self.random.uniform(0, 0.03))
        else:
            self._end(processes)
            codes = [process.exitcode for process in processes]
            assert fate == "file limit" or set(codes) <= {0, FULL}, codes
            self.counts["found the disk full"] += FULL in codes
            return True
        if all(process.is_alive() for process in processes):
            self._kill(processes, next(self.victims))
        self._end(processes)
        return True

    def _kill(self, processes, victims: list[int]) -> None:
        for rank in victims:
            os.kill(processes[rank].pid, signal.SIGKILL)
        self.counts["killed"] += 1
        self.counts[f"killed {victims} of {self.ranks}"] += 1
        self.counts["killed while saving"] += any(self._drafts())

    def _end(self, processes) -> None:
        """Wait for all of them: whoever is left without the others must not wait for them for ever."""
        for process in processes:
            process.join(PATIENCE)
        hanging = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for rank in hanging:
            processes[rank].kill()
        assert not hanging, f"ranks {hanging} wait for those that were killed"

    def _wait(self, processes, come) -> None:
        deadline = time.monotonic() + PATIENCE
        while all(process.is_alive() for process in processes) and not come() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _drafts(self):
        return self.checkpoints.glob(".writing_*")

    def last(self) -> int:
        """The step of the last checkpoint."""
        return max((int(path.name[5:]) for path in list_checkpoints(self.checkpoints)), default=0)

    def _largest_file(self) -> int:
        return max(file.stat().st_size for file in self.checkpoints.glob("step_*/*.safetensors"))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def check(self) -> None:
        """Complete or absent, whatever has happened; `latest` and `best` point at something."""
        for path in self.checkpoints.glob("step_*"):
            assert (path / COMPLETE).exists()
            stored = _stored(path)
            assert sum(name.startswith("model") for name in stored) in (1, self.ranks)
            assert sum(name.startswith("optimizer") for name in stored) in (1, self.ranks)
        for name in (LATEST, BEST):
            link = self.checkpoints / name
            assert not link.is_symlink() or (link / COMPLETE).exists()


def _stored(path: Path) -> dict[str, dict[str, torch.Tensor]]:
    """The tensors of a checkpoint's files."""
    return {file.name: load_file(file) for file in path.glob("*.safetensors")}


def history(folder: Path) -> list[tuple]:
    """What was logged of every step, but for times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [kept for line in lines if len(kept := tuple((k, v) for k, v in line.items() if "perf/" not in k)) > 1]


def assert_same_run(killed: Path, whole: Path) -> None:
    """To the last bit: what was logged, weights, moments, progress, and which checkpoints are left."""
    assert history(killed) == history(whole)
    ones, others = (_stored(find_checkpoint(folder)) for folder in (killed, whole))
    assert ones.keys() == others.keys()
    for file, one in ones.items():
        assert one.keys() == others[file].keys()
        assert all(torch.equal(one[name], others[file][name]) for name in one)
    states = [json.loads((find_checkpoint(folder) / "state.json").read_text()) for folder in (killed, whole)]
    assert states[0] == states[1]
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (killed, whole)]
    assert kept[0] == kept[1]


def whole_run(folder: Path, steps: int, *, ranks: int = 1, strategy: str = "auto") -> Path:
    """The same run, left alone."""
    KillRunner(folder, steps=steps, ranks=ranks, strategy=strategy).run(fates=[])
    return folder
