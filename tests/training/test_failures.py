"""Records that cannot be used and steps without a finite gradient: counted, named, bounded, and the same after a stop."""

import json
import math
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from conftest import compose_config
from helpers.multiprocess import on_ranks
from vpt.checkpoint.format import list_checkpoints
from vpt.checkpoint.tensors import unique_state_dict
from vpt.checkpoint.train_state import optimizer_tensors
from vpt.distributed.dtensor import full_tensor
from vpt.errors import DataError, TrainingError
from vpt.training.optimizer import lr_factor
from vpt.training.trainer import Trainer

RECORDS, BROKEN = 40, {3: "no such file", 11: "not an image", 25: "counts differ"}


@pytest.fixture
def data(tmp_path) -> Path:
    """Forty records of which three cannot be used, each for another reason."""
    records = []
    for number in range(RECORDS):
        Image.new("RGB", (56 + number, 60), (number * 6, 90, 40)).save(tmp_path / f"{number}.png")
        records.append({"messages": [{"role": "user", "content": "<image>\nwhat is it?"},
                                     {"role": "assistant", "content": f"number {number}"}], "images": [f"{number}.png"]})  # fmt: skip
    (tmp_path / "3.png").unlink()
    (tmp_path / "11.png").write_bytes(b"GIF89a broken")
    records[25]["images"] = []
    for split in ("train", "test"):
        (tmp_path / f"{split}.json").write_text(json.dumps(records))
    return tmp_path


def config_of(data: Path, *overrides: str):
    return compose_config(
        "encoder=[]", "data=vpt", f"data.root={data}", "+debug=two_steps", "tracking=none", "data.mixing=exhaust",
        "training.batch_size=8", "training.micro_batch_size=2", "training.steps=10", "training.checkpoint_every=4",
        "training.log_every=1", "training.eval_rows=0", *overrides,
    )  # fmt: skip


def lines(folder: Path, name: str) -> list[dict]:
    return [json.loads(line) for line in (folder / name).read_text().splitlines()]


def fitted(config, folder: Path, *, until: int | None = None, world=None) -> Trainer:
    """A run; with `until`, one that is dropped in that step without a word."""
    trainer = Trainer(config, folder, world)
    if until is None:
        trainer.fit()
        return trainer
    step = trainer.train_step

    def stopping(batches, number):
        if number == until:
            raise KeyError("dropped")
        return step(batches, number)

    trainer.train_step = stopping
    with pytest.raises(KeyError, match="dropped"):
        trainer.fit()
    return trainer


def state(trainer: Trainer) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}


def same(a: dict, b: dict) -> bool:
    return all(torch.equal(a[name], b[name]) for name in a)


def test_by_default_the_first_broken_record_ends_the_run(tmp_path, data):
    with pytest.raises(DataError, match=r"train\.json: record (3|11|25)"):
        Trainer(config_of(data), tmp_path / "run").fit()


@pytest.mark.parametrize("workers", [pytest.param(0, marks=pytest.mark.slow), 1])
def test_skipped_records_are_counted_and_named_and_resuming_is_exact(tmp_path, data, workers):
    """Two epochs: each broken record is skipped twice, and everything is as if the run had not been dropped."""
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.1", f"data.workers={workers}")
    whole = fitted(config, tmp_path / "whole")
    fitted(config, tmp_path / "dropped", until=7)
    again = fitted(config, tmp_path / "dropped")
    for run in (whole, again):
        skipped = lines(run.folder, "failures.jsonl")
        named = sorted(line["skipped"].split(": ")[1] for line in skipped)
        assert named == sorted([f"record {number}" for number in BROKEN] * 2)
        assert lines(run.folder, "metrics.jsonl")[-2]["data/skipped_records"] == run.state.skipped == 6
    assert lines(whole.folder, "failures.jsonl") == lines(again.folder, "failures.jsonl")
    assert same(state(whole), state(again))


def test_too_many_skipped_records_end_the_run(tmp_path, data):
    """From the first rows on: two in forty are more than chance makes of three in a thousand."""
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.003")
    with pytest.raises(
        DataError, match=r"2 of the first \d\d? records could not be used, more than data\.max_skipped_fraction=0\.003"
    ):
        Trainer(config, tmp_path / "run").fit()


def test_a_micro_batch_of_nothing_but_broken_records(tmp_path, data):
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.5", "training.micro_batch_size=1")
    run = fitted(config, tmp_path / "run")
    assert run.state.step == 10 and run.state.skipped == 6
    (data / "train.json").write_text(json.dumps([{"messages": []}] * 8))
    with pytest.raises(DataError, match="8 of the first 8 records could not be used"):
        Trainer(config, tmp_path / "nothing").fit()


def _spoilt_gradient(nll: torch.Tensor) -> torch.Tensor:
    nll.register_hook(lambda gradient: gradient * math.inf)
    return nll


SPOILT = {"loss": lambda nll: nll * math.nan, "gradient": _spoilt_gradient}


def poisoned(trainer: Trainer, steps: set[int], spoil=SPOILT["loss"]) -> Trainer:
    """A run in which these steps have no finite loss, or no finite gradient, on rank 0."""
    run, forward = trainer.train_step, trainer.strategy
    poison = {"on": False}

    def step(batches, number):
        poison["on"] = number in steps
        return run(batches, number)

    class Poisoned:
        name, grad_sync = forward.name, staticmethod(forward.grad_sync)

        def __call__(self, batch):
            out = forward(batch)
            first = poison["on"] and trainer.world.rank == 0
            return replace(out, nll=spoil(out.nll)) if first else out

    trainer.train_step, trainer.strategy = step, Poisoned()
    return trainer


def test_a_step_that_is_not_finite_changes_nothing(tmp_path, data):
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.1", "training.steps=6")
    run = poisoned(Trainer(config, tmp_path / "run"), {2, 5})
    seen, step = [], run.train_step

    def watching(batches, number):
        before = state(run)
        moments = [{k: v.clone() for k, v in s.items()} for s in run.optimizer.state.values()]
        result = step(batches, number)
        after = list(run.optimizer.state.values())
        still = all(torch.equal(a[k], b[k]) for a, b in zip(moments, after) for k in a)
        seen.append((same(before, state(run)) and still, "train/loss" in result.metrics))
        return result

    run.train_step = watching
    run.fit()
    assert seen == [(number in (2, 5), number not in (2, 5)) for number in range(6)]
    lost = [line for line in lines(run.folder, "failures.jsonl") if "lost" in line]
    assert [line["step"] for line in lost] == [3, 6]
    assert lost[0]["lost"]["loss"] == "nan" and 7 <= len(lost[0]["records"]) <= 8
    metrics = [line for line in lines(run.folder, "metrics.jsonl") if "train/nonfinite_steps" in line]
    assert [line["train/nonfinite_steps"] for line in metrics] == [0, 0, 1, 1, 1, 2]
    optim = config.optim
    rates = [
        optim.lr * lr_factor(step, steps=6, warmup=optim.warmup_ratio, final=optim.min_lr_ratio) for step in range(6)
    ]
    assert [line["train/lr"] for line in metrics] == rates  # the schedule goes on


def test_too_many_in_a_row_leave_a_checkpoint_from_before(tmp_path, data):
    """Also where a checkpoint would have been due in between; going on from it is as if nothing had been."""
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.1", "training.max_nonfinite_steps=2",
                       "training.steps=8", "training.checkpoint_every=4")  # fmt: skip
    sound = fitted(config, tmp_path / "sound")
    run = poisoned(Trainer(config, tmp_path / "run"), {2, 3, 4})
    with pytest.raises(TrainingError, match=r"the last 3 steps in a row .* All checkpoints are from before them"):
        run.fit()
    assert [path.name for path in list_checkpoints(run.folder / "checkpoints")] == ["step_00000002"]
    again = fitted(config, run.folder)
    assert again.state.nonfinite_steps == 0 and same(state(sound), state(again))
    assert all("lost" not in line for line in lines(run.folder, "failures.jsonl"))
    few = poisoned(Trainer(config, tmp_path / "few"), {1, 2, 4, 5})
    few.fit()
    assert few.state.nonfinite_steps == 4 and few.state.consecutive_nonfinite == 0


def test_a_run_that_has_lost_every_step_so_far_is_saved_too(tmp_path, data):
    """Though its optimizer holds nothing yet."""
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.1", "training.steps=2")
    poisoned(Trainer(config, tmp_path / "run"), {0, 1}).fit()
    again = Trainer(config, tmp_path / "run")
    assert again.state.step == again.state.nonfinite_steps == 2 and not again.optimizer.state


def whole(trainer: Trainer) -> dict[str, torch.Tensor]:
    """Weights and the optimizer's moments, whatever this process holds of them."""
    tensors = unique_state_dict(trainer.model) | optimizer_tensors(trainer.optimizer)
    return {name: full_tensor(tensor).clone() for name, tensor in tensors.items()}


def _on_a_rank(world, config, folder: str, spoil: str) -> dict:
    """Steps 2, 8 and 9 are spoilt, of which the last two in a row are too many."""
    run = poisoned(Trainer(config, Path(folder) / "run", world), {1, 7, 8}, SPOILT[spoil])
    held, step = [], run.train_step

    def watching(batches, number):
        held.append(whole(run))
        return step(batches, number)

    run.train_step = watching
    with pytest.raises(TrainingError) as ended:
        run.fit()
    held.append(whole(run))
    if world.is_main:
        save_file(held[7], Path(folder) / "before.safetensors")
    changed = [before.keys() != after.keys() or not same(before, after) for before, after in pairwise(held)]
    progress = run.failures.state
    return {
        "error": str(ended.value),
        "lost": progress.nonfinite_steps,
        "skipped": progress.skipped,
        "changed": changed,
    }


@pytest.mark.parametrize(("strategy", "spoil"), [
    ("ddp", "loss"), *(pytest.param("fsdp", spoil, marks=pytest.mark.slow) for spoil in ("loss", "gradient"))
])  # fmt: skip
def test_all_ranks_skip_and_stop_together(tmp_path, data, strategy, spoil):
    """Only rank 0's loss or gradient is not finite, and each rank finds other records broken."""
    config = config_of(data, "data.on_error=skip", "data.max_skipped_fraction=0.1", "training.max_nonfinite_steps=1",
                       f"strategy={strategy}", "training.batch_size=7")  # fmt: skip
    first, second = on_ranks(2, _on_a_rank, config, str(tmp_path), spoil, folder=tmp_path)
    assert first == second and "the last 2 steps in a row" in first["error"] and first["lost"] == 3
    assert first["changed"] == [number not in (1, 7, 8) for number in range(9)]
    written = lines(tmp_path / "run", "failures.jsonl")
    assert sum("skipped" in line for line in written) == first["skipped"] >= 3
    alone = Trainer(replace(config, strategy=replace(config.strategy, kind="single")), tmp_path / "run")
    lost = [line for line in written if "lost" in line]
    assert [line["step"] for line in lost] == [2, 8, 9]
    for line in lost:  # those of both ranks
        assert sorted(line["records"]) == sorted(
            n for batch in alone.objective.dataset[line["step"] - 1] for n in batch.ids
        )
    assert alone.state.step == 7 and alone.state.nonfinite_steps == 1
    before, after = load_file(tmp_path / "before.safetensors"), whole(alone)
    assert before.keys() == after.keys() and same(before, after)
