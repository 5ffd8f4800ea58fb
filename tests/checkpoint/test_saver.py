"""Checkpoints: resharded, written while training goes on, the best kept, signals, no pickles."""

import gc
import math
import multiprocessing
import os
import pickle
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from torch.distributed.checkpoint import HuggingFaceStorageWriter

from conftest import ROOT, compose_config, logged, losses
from helpers.multiprocess import PATIENCE, on_ranks
from helpers.stopped import fit_until
from vpt.checkpoint.format import COMPLETE, LATEST, find_checkpoint, list_checkpoints
from vpt.checkpoint.load import load_pretrained
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict
from vpt.checkpoint.train_state import TrainState, optimizer_tensors
from vpt.distributed.process_group import World
from vpt.errors import PREEMPTED, WRONG_INPUT, ConfigError
from vpt.training.preemption import PreemptionHandler
from vpt.training.trainer import Trainer

SMALL = (
    "+experiment=all", "+debug=two_steps", "training.batch_size=4", "training.checkpoint_every=2", "training.eval_every=0",
    "data.limit=4",
)  # fmt: skip


def until(world: World, folder: str, strategy: str, stop: int) -> int:
    """Go on with a run of eight steps; one process alone is told to stop after step `stop`. Returns its exit code."""
    overrides = [f"strategy={strategy}", *(["strategy.shard_size=2"] if strategy == "hybrid" else [])]
    # AdamW takes a full step by the sign of a gradient far below eps, which may be rounding's alone, and the machine's.
    overrides += ["optim.eps=1e-6"]
    trainer = Trainer(compose_config(*SMALL, "training.steps=8", *overrides), Path(folder), world)
    step = trainer.train_step

    def told(batches, number):
        if number == stop - 1 and stop < 8 and world.rank == world.size - 1:
            trainer.preemption.code = PREEMPTED
        return step(batches, number)

    trainer.train_step = told
    try:
        trainer.fit()
    except SystemExit as left:
        return left.code
    return 0


def assert_worlds_continue_each_other(tmp_path: Path, worlds: list[tuple[int, str]]) -> None:
    run, stops = tmp_path / "run", [8 * (number + 1) // len(worlds) for number in range(len(worlds))]
    for (size, strategy), stop in zip(worlds, stops, strict=True):
        if size == 1:
            codes = [until(World(), str(run), strategy, stop)]
        else:
            codes = on_ranks(size, until, str(run), strategy, stop, folder=tmp_path)
        assert codes == [PREEMPTED if stop < 8 else 0] * size
        found = find_checkpoint(run)
        assert found.name == f"step_{stop:08d}" and (run / "checkpoints" / LATEST).resolve() == found
        files = [path.name for path in found.glob("model*.safetensors")]
        assert len(files) == size and (size > 1 or files == ["model.safetensors"])
        whole = load_pretrained(run).model.state_dict()  # by one process, whatever number has saved
        assert all(torch.equal(tensor, whole[name]) for name, tensor in LazyStateDict(found).items())
    until(World(), str(tmp_path / "alone"), "single", 8)
    assert losses(run) == pytest.approx(losses(tmp_path / "alone"), rel=1e-5)
    ours, whole = (dict(LazyStateDict(find_checkpoint(folder))) for folder in (run, tmp_path / "alone"))
    torch.testing.assert_close(ours, whole, rtol=1e-3, atol=1e-4)


def test_saved_by_two_resumed_by_one_and_back(tmp_path):
    assert_worlds_continue_each_other(tmp_path, [(2, "fsdp"), (1, "single"), (2, "ddp")])


@pytest.mark.slow
def test_saved_by_four_resumed_by_one_and_two_and_back(tmp_path):
    assert_worlds_continue_each_other(tmp_path, [(4, "fsdp"), (1, "single"), (2, "hybrid"), (4, "ddp")])


def trainer_at(folder: Path, *overrides: str) -> Trainer:
    return Trainer(compose_config(*SMALL, *overrides), folder)


def test_training_goes_on_while_a_checkpoint_is_written(tmp_path, monkeypatch):
    """What is written is the moment of the save, though weights have changed before the first byte."""
    gate, write = threading.Event(), HuggingFaceStorageWriter.write_data

    def waiting(self, plan, planner):
        assert gate.wait(600)
        return write(self, plan, planner)

    monkeypatch.setattr(HuggingFaceStorageWriter, "write_data", waiting)
    trainer = trainer_at(tmp_path / "run")
    trainer.train_step(trainer.objective.dataset[0], 0)
    trainer.state.step = 1
    before = {name: tensor.clone() for name, tensor in unique_state_dict(trainer.model).items()}
    moments = {name: tensor.clone() for name, tensor in optimizer_tensors(trainer.optimizer).items()}
    trainer.save()
    trainer.train_step(trainer.objective.dataset[1], 1)
    assert not list_checkpoints(tmp_path / "run" / "checkpoints")
    gate.set()
    trainer.saver.wait()
    [found] = list_checkpoints(tmp_path / "run" / "checkpoints")
    stored = LazyStateDict(found)
    assert all(torch.equal(stored[name], tensor) for name, tensor in before.items())
    assert not all(torch.equal(stored[name], tensor) for name, tensor in unique_state_dict(trainer.model).items())
    again = trainer_at(tmp_path / "run")
    held = optimizer_tensors(again.optimizer)
    assert held.keys() == moments.keys() and all(torch.equal(held[name], moments[name]) for name in moments)


def test_the_last_and_the_best_stay(tmp_path):
    """Also where the best one was no step at which a checkpoint was due."""
    trainer = trainer_at(tmp_path / "run", "training.steps=9", "training.eval_every=1", "training.checkpoint_every=4",
                         "training.keep_checkpoints=1", "training.best_metric=eval/token_accuracy")  # fmt: skip
    accuracies = iter([0.1, 0.5, 0.9, 0.9, 0.2, 0.3, 0.1, 0.2, 0.4])
    trainer.evaluate = lambda: {"eval/token_accuracy": next(accuracies)}
    trainer.fit()
    folder = tmp_path / "run" / "checkpoints"
    assert [path.name for path in list_checkpoints(folder)] == ["step_00000003", "step_00000009"]
    assert os.readlink(folder / "best") == "step_00000003" and os.readlink(folder / "latest") == "step_00000009"
    assert find_checkpoint(folder / "best").name == "best" and find_checkpoint(tmp_path / "run").name == "step_00000009"
    assert trainer_at(tmp_path / "run", "training.steps=9").state.best == 0.9


@pytest.mark.parametrize("stops", [pytest.param([2], marks=pytest.mark.slow), [4, 5]])
def test_an_evaluation_that_was_due_where_a_run_was_stopped_comes_first(tmp_path, stops):
    """The last step is evaluated too, and may be the best one; all is as if nothing had stopped the run."""

    def fit(folder: Path, stop: int = 0) -> None:
        trainer = trainer_at(folder, "training.steps=5", "training.eval_every=2", "training.keep_checkpoints=1",
                             "training.best_metric=eval/token_accuracy")  # fmt: skip
        evaluate = trainer.evaluate
        trainer.evaluate = lambda: evaluate() | {"eval/token_accuracy": float(trainer.state.step % 5)}
        fit_until(trainer, stop)

    fit(tmp_path / "whole")
    for stop in (*stops, 0):
        fit(tmp_path / "stopped", stop)
    whole, stopped = (logged(tmp_path / name, "eval/loss") for name in ("whole", "stopped"))
    assert [line["step"] for line in whole] == [2, 4, 5] and whole == stopped
    for name in ("whole", "stopped"):
        assert os.readlink(tmp_path / name / "checkpoints" / "best") == "step_00000004"
        assert os.readlink(tmp_path / name / "checkpoints" / "latest") == "step_00000005"


def test_the_last_step_may_be_the_best(tmp_path):
    trainer = trainer_at(tmp_path, "training.steps=2", "training.eval_every=5", "training.keep_checkpoints=1")
    trainer.fit()
    assert trainer.state.best_step == 2 and os.readlink(tmp_path / "checkpoints" / "best") == "step_00000002"


def test_a_metric_that_does_not_exist_is_named(tmp_path):
    """Before anything is trained."""
    trainer_at(tmp_path / "known", "training.best_metric=eval/perception/dino_start")
    with pytest.raises(
        ConfigError,
        match=r"training\.best_metric=eval/los is not a metric of the evaluation; .* did you mean eval/loss",
    ):
        trainer_at(tmp_path / "run", "training.best_metric=eval/los")


def test_a_score_that_is_no_number_is_never_the_best():
    state, scores = TrainState(), [math.nan, 2.0, math.nan, 3.0, 1.0]
    assert [state.is_best({"eval/loss": score}, by="eval/loss") for score in scores] == [
        False,
        True,
        False,
        False,
        True,
    ]
    assert state.best == 1.0


def test_a_signal_to_the_whole_group_leaves_data_workers_to_the_run(tmp_path):
    """As `timeout` and systemd send it: the run saves, and its workers end with it."""
    trainer = trainer_at(tmp_path / "run", "training.steps=50", "training.checkpoint_every=1000", "data.workers=2")
    step, workers = trainer.train_step, []

    def told(batches, at):
        if at == 1:
            workers.extend(multiprocessing.active_children())
            pids = [os.getpid(), *(worker.pid for worker in workers)]
            subprocess.run(["kill", "-TERM", *map(str, pids)], check=True)  # not from their parent
            assert not any(worker.join(0.5) or worker.exitcode is not None for worker in workers)
        return step(batches, at)

    trainer.train_step = told
    with pytest.raises(SystemExit) as left:
        trainer.fit()
    assert left.value.code == PREEMPTED and find_checkpoint(tmp_path / "run").name == "step_00000002"
    del left  # its traceback holds the loader
    gc.collect()
    for worker in workers:
        worker.join(PATIENCE)
    assert [worker.exitcode for worker in workers] == [0, 0]


def test_a_signal_during_the_final_answers_is_handed_on_too(monkeypatch):
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda *_: seen.append("queued again"))
    try:
        with pytest.raises(SystemExit) as left, PreemptionHandler(deferred=False):
            os.kill(os.getpid(), signal.SIGUSR1)
    finally:
        signal.signal(signal.SIGUSR1, before)
    assert left.value.code == PREEMPTED and seen == ["queued again"]


@pytest.mark.parametrize(
    "number",
    [signal.SIGTERM, *(pytest.param(number, marks=pytest.mark.slow) for number in (signal.SIGUSR1, signal.SIGUSR2))],
)
def test_signals_save_and_are_handed_on(tmp_path, number):
    """To whoever watched before (submitit, which queues the job again), once the checkpoint is in place."""
    trainer = trainer_at(tmp_path / "run", "training.steps=50", "training.checkpoint_every=1000")
    step, seen = trainer.train_step, []

    def told(batches, at):
        if at == 1:
            os.kill(os.getpid(), number)
        return step(batches, at)

    trainer.train_step = told
    before = signal.signal(number, lambda *_: seen.append(find_checkpoint(tmp_path / "run").name))
    try:
        with pytest.raises(SystemExit) as left:
            trainer.fit()
    finally:
        signal.signal(number, before)
    assert left.value.code == PREEMPTED and seen == ["step_00000002"]


def test_no_pickle_is_written_or_read(tmp_path, monkeypatch):
    """Not even where a stranger has put one beside the tensors."""
    trainer = trainer_at(tmp_path / "run", "training.steps=2")
    trainer.fit()
    found = find_checkpoint(tmp_path / "run")
    kinds = {path.suffix for path in found.rglob("*") if path.is_file()}
    assert kinds <= {".safetensors", ".json", ".yaml", ".jinja", ".txt", ""}
    assert (found / COMPLETE).read_bytes() == b""
    (found / ".metadata").write_bytes(pickle.dumps(print))

    def refuse(*_, **__):
        raise AssertionError("unpickled")

    monkeypatch.setattr(pickle, "load", refuse)
    monkeypatch.setattr(pickle, "loads", refuse)
    monkeypatch.setattr(pickle, "Unpickler", refuse)
    assert trainer_at(tmp_path / "run", "training.steps=2").state.step == 2


def launched(folder: Path, *overrides: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "vpt", "launch", "--standalone", "--nproc-per-node", "2", "train.py"]
    small = ["+experiment=dino", "+debug=two_steps", "training.checkpoint_every=1000", f"output_dir={folder}"]
    return subprocess.Popen([*command, *small, *overrides], cwd=ROOT, stderr=subprocess.PIPE, text=True)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGTERM])
def test_torchrun_hands_signals_and_exit_codes_on(tmp_path, number):
    """Told of a signal, both processes save the step that they are in, and the launcher exits as they do."""
    metrics = tmp_path / "dino" / "metrics.jsonl"
    program = launched(tmp_path, "training.steps=1000")
    deadline = time.monotonic() + PATIENCE
    while not (metrics.exists() and metrics.read_text()) and program.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    program.send_signal(number)
    _, said = program.communicate(timeout=PATIENCE)
    assert program.returncode == PREEMPTED, said
    assert "saved; type the same command to go on" in said
    assert find_checkpoint(tmp_path / "dino").name == f"step_{len(losses(tmp_path / 'dino')):08d}"


@pytest.mark.slow
def test_torchrun_hands_an_error_on(tmp_path):
    program = launched(tmp_path, "strategy=single")
    _, said = program.communicate(timeout=PATIENCE)
    assert program.returncode == WRONG_INPUT and "strategy=single is for one process, 2 run" in said
