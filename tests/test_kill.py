"""kill -9 at any moment, also while saving, and full disks: the run goes on to the last bit as if nothing had been."""

import json
import os
import random
import resource
import signal
import subprocess
import time
from collections import Counter
from pathlib import Path

import pytest
import torch
from ranks import FORKING
from safetensors.torch import load_file

from conftest import compose_config
from vpt.errors import CheckpointError
from vpt.training import checkpoint
from vpt.training.loop import Trainer

OVERRIDES = (
    "+experiment=free_choice", "+debug=two_steps", "training.batch_size=2", "training.checkpoint_every=1",
    "training.eval_every=3", "training.eval_rows=2", "data.limit=2",
)  # fmt: skip
PATIENCE = 1800  # seconds for an attempt
FULL = 7  # exit code of an attempt that found the disk full and said so


def attempt(folder: str, steps: int, file_limit: int | None) -> None:
    """One process's try at the run. `file_limit`: bytes that a file may have, for want of a disk that is full."""
    torch.set_num_threads(1)
    if file_limit is not None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, file_limit))
    try:
        Trainer(compose_config(*OVERRIDES, f"training.steps={steps}"), Path(folder)).fit()
    except CheckpointError as error:
        os._exit(FULL if "make room" in str(error) else 1)
    except OSError:
        os._exit(FULL)


class Tormentor:
    """Starts a run again and again and does away with it, until it has come to its end."""

    def __init__(self, folder: Path, *, steps: int, seed: int) -> None:
        self.folder, self.steps, self.seed = folder, steps, seed
        self.random = random.Random(seed)
        self.counts: Counter[str] = Counter()

    def torment(self, *, fates: list[str]) -> None:
        """One attempt for each fate, then as many as it takes."""
        for fate in fates:
            self._try(fate)
            self._check()
        while self._try("left alone"):
            pass

    def _try(self, fate: str) -> bool:
        """Whether there was anything left to do."""
        before = self._last()
        if before == self.steps:
            return False
        limit = self.random.randrange(1000, self._largest_file()) if fate == "file limit" and before else None
        process = FORKING.Process(target=attempt, args=(str(self.folder), self.steps, limit))
        process.start()
        if fate == "at any time":
            time.sleep(self.random.uniform(0, 6))
        elif fate == "after a step":
            self._wait(process, lambda: self._last() > before)
            time.sleep(self.random.uniform(0, 0.5))
        elif fate == "while saving":
            self._wait(process, lambda: self._last() > before and any(self._drafts()))
            time.sleep(self.random.uniform(0, 0.03))
        else:
            process.join(PATIENCE)
            self.counts["found the disk full"] += process.exitcode == FULL
        if process.is_alive():
            os.kill(process.pid, signal.SIGKILL)
            self.counts["killed"] += 1
            self.counts["killed while saving"] += any(self._drafts())
        process.join()
        return True

    def _wait(self, process, come) -> None:
        deadline = time.monotonic() + PATIENCE
        while process.is_alive() and not come() and time.monotonic() < deadline:
            time.sleep(0.001)

    def _drafts(self):
        return self.checkpoints.glob(".writing_*")

    def _last(self) -> int:
        return max((int(path.name[5:]) for path in checkpoint.steps(self.checkpoints)), default=0)

    def _largest_file(self) -> int:
        return max(file.stat().st_size for file in self.checkpoints.glob("step_*/*.safetensors"))

    @property
    def checkpoints(self) -> Path:
        return self.folder / "checkpoints"

    def _check(self) -> None:
        """Complete or absent, whatever has happened; `latest` and `best` point at something."""
        for path in self.checkpoints.glob("step_*"):
            assert (path / checkpoint.COMPLETE).exists()
            for file in ("model", "optimizer"):
                load_file(path / f"{file}.safetensors")
        for name in (checkpoint.LATEST, checkpoint.BEST):
            link = self.checkpoints / name
            assert not link.is_symlink() or (link / checkpoint.COMPLETE).exists()


def history(folder: Path) -> list[tuple]:
    """What was logged of every step, but for times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [kept for line in lines if len(kept := tuple((k, v) for k, v in line.items() if "perf/" not in k)) > 1]


def assert_same_run(tormented: Path, whole: Path) -> None:
    assert history(tormented) == history(whole)
    for file in ("model", "optimizer"):
        one, other = (load_file(checkpoint.find(folder) / f"{file}.safetensors") for folder in (tormented, whole))
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
    states = [json.loads((checkpoint.find(folder) / "state.json").read_text()) for folder in (tormented, whole)]
    assert states[0] == states[1]
    kept = [sorted(path.name for path in (folder / "checkpoints").iterdir()) for folder in (tormented, whole)]
    assert kept[0] == kept[1]


def whole_run(folder: Path, steps: int) -> Path:
    Trainer(compose_config(*OVERRIDES, f"training.steps={steps}"), folder).fit()
    return folder


def test_a_few_kills(tmp_path):
    tormentor = Tormentor(tmp_path / "tormented", steps=8, seed=0)
    tormentor.torment(fates=["after a step", "while saving", "file limit", "while saving"])
    assert tormentor.counts["killed"] >= 3 and tormentor.counts["found the disk full"] == 1
    assert_same_run(tormentor.folder, whole_run(tmp_path / "whole", 8))


@pytest.mark.slow
def test_forty_kills(tmp_path):
    """Five runs; whatever else is random, at least forty attempts at them are killed."""
    whole = whole_run(tmp_path / "whole", 24)
    totals: Counter[str] = Counter()
    for seed in range(5):
        tormentor = Tormentor(tmp_path / f"run{seed}", steps=24, seed=seed)
        fates = [*["at any time"] * 3, *["after a step"] * 2, *["while saving"] * 6, *["file limit"] * 3]
        tormentor.random.shuffle(fates)
        tormentor.torment(fates=["after a step", *fates])
        assert_same_run(tormentor.folder, whole)
        totals += tormentor.counts
    print(dict(totals))
    assert totals["killed"] >= 40 and totals["killed while saving"] >= 15 and totals["found the disk full"] >= 10


@pytest.fixture
def small_disk(tmp_path):
    """A disk of its own, with room for two checkpoints and a bit."""
    disk = tmp_path / "disk"
    disk.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=36m", "tmpfs", disk], capture_output=True, check=False)
    if done.returncode:
        pytest.skip("may not mount a disk of its own here")
    yield disk
    subprocess.run(["umount", "-l", disk], check=True)


@pytest.mark.slow
def test_a_disk_that_is_full(small_disk, tmp_path):
    """It says so and stops; once there is room, the run goes on."""
    tormentor = Tormentor(small_disk / "run", steps=8, seed=0)
    tormentor._try("left alone")
    assert tormentor.counts["found the disk full"] == 1 and 1 <= tormentor._last() < 8
    tormentor._check()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    tormentor.torment(fates=[])
    assert_same_run(tormentor.folder, whole_run(tmp_path / "whole", 8))
