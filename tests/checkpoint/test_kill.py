"""kill -9 at any moment, also while saving, and full disks: the run goes on to the last bit as if nothing had been."""

import subprocess
from collections import Counter

import pytest

from helpers.kill_runner import KillRunner, assert_same_run, whole_run


def test_a_few_kills(tmp_path):
    runner = KillRunner(tmp_path / "killed", steps=8, seed=0)
    runner.run(fates=["after a step", "while saving", "file limit", "while saving"])
    assert runner.counts["killed"] >= 3 and runner.counts["found the disk full"] == 1
    assert_same_run(runner.folder, whole_run(tmp_path / "whole", 8))


@pytest.mark.slow
def test_forty_kills(tmp_path):
    """Five runs; whatever else is random, at least forty attempts at them are killed."""
    whole = whole_run(tmp_path / "whole", 24)
    totals: Counter[str] = Counter()
    for seed in range(5):
        runner = KillRunner(tmp_path / f"run{seed}", steps=24, seed=seed)
        fates = [*["at any time"] * 3, *["after a step"] * 2, *["while saving"] * 6, *["file limit"] * 3]
        runner.random.shuffle(fates)
        runner.run(fates=["after a step", *fates])
        assert_same_run(runner.folder, whole)
        totals += runner.counts
    print(dict(totals))
    assert totals["killed"] >= 40 and totals["killed while saving"] >= 15 and totals["found the disk full"] >= 10


@pytest.mark.slow
@pytest.mark.parametrize("strategy", ["fsdp", "ddp"])
def test_kills_of_two_processes(tmp_path, strategy):
    """One of them, the other, and both: whoever is left ends, and together they go on to the last bit."""
    runner = KillRunner(tmp_path / "killed", steps=20, seed=0, ranks=2, strategy=strategy)
    runner.run(fates=["after a step", *["while saving"] * 5, "after a step", "at any time"])
    assert runner.counts["killed"] >= 6 and runner.counts["killed while saving"] >= 2
    assert all(runner.counts[f"killed {victims} of 2"] for victims in ([0], [1], [0, 1]))
    assert_same_run(runner.folder, whole_run(tmp_path / "whole", 20, ranks=2, strategy=strategy))


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
    runner = KillRunner(small_disk / "run", steps=8, seed=0)
    runner.try_once("left alone")
    assert runner.counts["found the disk full"] == 1 and 1 <= runner.last() < 8
    runner.check()
    subprocess.run(["mount", "-o", "remount,size=200m", small_disk], check=True)
    runner.run(fates=[])
    assert_same_run(runner.folder, whole_run(tmp_path / "whole", 8))
