"""The loop: grouping, freezing, schedules, and going on after a stop as if there had been none."""

import json
import shutil
import signal
import time
import weakref
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from conftest import compose_config, logged, losses
from helpers.programs import Program, run_program
from vpt.checkpoint.checksums import CHECKSUMS
from vpt.checkpoint.format import STEP_FOLDER, find_checkpoint, list_checkpoints
from vpt.checkpoint.load import load_pretrained
from vpt.cli.train import train
from vpt.errors import CheckpointError, ConfigError, DataError
from vpt.training.optimizer import build_optimizer, lr_factor, set_trainable
from vpt.training.setup import build_training
from vpt.training.trainer import Trainer

SMALL = (
    "+debug=two_steps", "+experiment=all", "training.batch_size=4", "training.micro_batch_size=2", "tracking=none",
    "training.steps=6", "training.checkpoint_every=2", "data.limit=4",
)  # fmt: skip


def trained(folder: Path, *overrides: str, until: int | None = None) -> Trainer:
    """A run in `folder`; with `until`, one that is dropped after that step without a word."""
    trainer = Trainer(compose_config(*SMALL, *overrides), folder)
    if until is not None:
        step, report = trainer.train_step, {}

        def stopping(batches, number):
            if number == until:
                raise KeyError("dropped")
            report[number] = step(batches, number)
            return report[number]

        trainer.train_step = stopping
        with pytest.raises(KeyError, match="dropped"):
            trainer.fit()
    else:
        trainer.fit()
    return trainer


def test_eight_by_one_equals_two_by_four(tmp_path):
    """Micro-batches are how a step is computed, not what it computes."""
    one = trained(tmp_path / "one", "training.batch_size=8", "training.micro_batch_size=8", "training.steps=3")
    two = trained(tmp_path / "two", "training.batch_size=8", "training.micro_batch_size=3", "training.steps=3")
    for a, b in zip(losses(one.folder), losses(two.folder), strict=True):
        assert a == pytest.approx(b, rel=1e-5)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> Trainer:
    """A run that nothing has stopped."""
    return trained(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def dropped_runs(tmp_path_factory) -> Callable[[int], Path]:
    """Runs by the step after which they were dropped."""
    return cache(lambda until: trained(tmp_path_factory.mktemp("dropped") / "run", until=until).folder)


@pytest.fixture
def dropped(dropped_runs, tmp_path) -> Callable[..., Path]:
    """A copy of one of them."""
    return lambda until=3: shutil.copytree(dropped_runs(until), tmp_path / "run", symlinks=True)


@pytest.mark.parametrize("until", [3, 4, pytest.param(5, marks=pytest.mark.slow)])
def test_a_dropped_run_goes_on_as_if_it_had_not_been(dropped, whole, until):
    """Whatever step it is dropped in: the same losses and the same weights, to the last bit."""
    again = trained(dropped(until))
    assert losses(whole.folder) == losses(again.folder)
    a, b = whole.model.state_dict(), again.model.state_dict()
    assert all(torch.equal(a[name], b[name]) for name in a)


def test_killed_and_interrupted_by_hand(tmp_path):
    """kill -9 and Ctrl-C in a real process; the same command goes on."""
    command = ["train.py", *SMALL, f"output_dir={tmp_path}", "training.steps=200", "training.eval_rows=0"]

    def wait_for_step(step: int, program: Program) -> None:
        for _ in range(12_000):  # a busy machine is no failure
            path = tmp_path / "stopped" / "metrics.jsonl"
            if path.exists() and f'"step": {step},' in path.read_text():
                return
            assert program.process.is_alive(), program.output
            time.sleep(0.05)
        raise AssertionError("the run did not get there")

    killed = Program(*command, "run_name=stopped")
    wait_for_step(5, killed)
    killed.send_signal(signal.SIGKILL)
    killed.process.join()
    stopped = Program(*command, "run_name=stopped")
    wait_for_step(12, stopped)
    stopped.send_signal(signal.SIGINT)
    assert stopped.wait().returncode == 130, stopped.output
    assert "type the same command to go on" in stopped.output
    steps = [line["step"] for line in logged(tmp_path / "stopped", "train/loss")]
    assert steps == list(range(1, steps[-1] + 1)) and steps[-1] >= 12
    assert find_checkpoint(tmp_path / "stopped").name == STEP_FOLDER.format(steps[-1])


def test_another_configuration_is_refused_with_the_difference(dropped):
    run = dropped()
    with pytest.raises(CheckpointError, match=r"optim.lr: 0.0008 -> 0.5"):
        Trainer(compose_config(*SMALL, "optim.lr=0.5"), run)
    Trainer(compose_config(*SMALL, "training.micro_batch_size=4", "data.workers=1"), run)


def test_a_checkpoint_is_complete_or_absent(dropped):
    run = dropped()
    folder = run / "checkpoints"
    shutil.copytree(list_checkpoints(folder)[-1], folder / ".writing_step_00000009")
    assert find_checkpoint(run).name == "step_00000002"
    broken = find_checkpoint(run) / "model.safetensors"
    broken.write_bytes(broken.read_bytes()[:1000])
    with pytest.raises(
        CheckpointError, match=r"model\.safetensors is not what was written there; .*remove \S+00000002"
    ):
        Trainer(compose_config(*SMALL), run)
    (broken.parent / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match="cannot be read"):
        Trainer(compose_config(*SMALL), run)


def test_a_missing_tensor_is_named(dropped):
    from safetensors.torch import save_file

    run = dropped()
    path = find_checkpoint(run) / "model.safetensors"
    tensors = load_file(path)
    del tensors["encoders.sam.projector.conv_feature.bias"]
    save_file(tensors, path)
    (path.parent / CHECKSUMS).unlink()
    with pytest.raises(CheckpointError, match=r"missing: encoders\.sam\.projector\.conv_feature\.bias"):
        Trainer(compose_config(*SMALL), run)


def test_starting_from_another_run(tmp_path, dropped):
    first = dropped()
    config = compose_config("+debug=two_steps", "+experiment=dino", f"init_from={first}", "tracking=none")
    config = replace(config, model=replace(config.model))
    with pytest.raises(CheckpointError, match="does not fit"):
        Trainer(
            replace(config, model=replace(config.model, config={**config.model.config, "vocab_size": 640})),
            tmp_path / "x",
        )
    second = Trainer(config, tmp_path / "second")
    saved = load_file(find_checkpoint(first) / "model.safetensors")
    assert torch.equal(second.model.state_dict()["encoders.dino.projector.linear_feature.weight"],
                       saved["encoders.dino.projector.linear_feature.weight"])  # fmt: skip


def test_groups_are_disjoint_and_complete(make_parts):
    model = make_parts("+experiment=all").model
    optim = compose_config("+experiment=all").optim
    optim = replace(optim, lr_scale={"encoders.dino.*": 0.1, "*projector*": 2.0}, freeze=["qwen.model.visual.*"])
    set_trainable(model, optim, tower_pretrained=False)
    groups = build_optimizer(model, optim).param_groups
    names = [name for group in groups for name in group["names"]]
    assert sorted(names) == sorted(n for n, p in model.named_parameters() if p.requires_grad)
    assert len(set(names)) == len(names) and not any("qwen.model.visual" in name for name in names)
    by_name = {name: group for group in groups for name in group["names"]}
    assert by_name["encoders.dino.projector.linear_feature.weight"]["lr"] == pytest.approx(8e-5)
    assert by_name["encoders.sam.projector.conv_feature.weight"]["lr"] == pytest.approx(1.6e-3)
    assert by_name["qwen.model.language_model.norm.weight"]["weight_decay"] == 0
    assert by_name["qwen.model.language_model.embed_tokens.weight"]["weight_decay"] == 0


def test_pretrained_towers_are_frozen_and_random_ones_trained(make_parts):
    model = make_parts("+experiment=dino").model
    optim = compose_config("+experiment=dino").optim
    set_trainable(model, optim, tower_pretrained=False)
    assert model.encoders["dino"].vision.layernorm.weight.requires_grad
    model.encoders["dino"].pretrained = True
    set_trainable(model, optim, tower_pretrained=True)
    trained_now = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert not any(".vision." in name or ".visual." in name for name in trained_now)
    set_trainable(model, replace(optim, freeze=["*"], unfreeze=["*.projector.*"]), tower_pretrained=True)
    assert all(".projector." in name for name, p in model.named_parameters() if p.requires_grad)
    with pytest.raises(ConfigError, match="matches no parameter"):
        set_trainable(model, replace(optim, unfreeze=["*.projektor.*"]), tower_pretrained=True)


def test_the_rate_warms_up_and_falls_along_a_cosine():
    rates = [lr_factor(step, steps=100, warmup=0.1, final=0.2) for step in range(101)]
    assert rates[0] == pytest.approx(0.1) and rates[9] == pytest.approx(1.0) and max(rates) == pytest.approx(1.0)
    assert rates[55] == pytest.approx(0.6) and rates[100] == pytest.approx(0.2)


def test_evaluation_equals_training(tmp_path):
    """eval.py finds what training printed."""
    config = compose_config(
        *SMALL, "training.steps=3", "data.limit=16", "training.final_eval_questions=16", "pictures=true"
    )
    train(config, tmp_path / "run")
    said = json.loads((tmp_path / "run" / "summary.json").read_text())
    done = run_program("eval.py", f"checkpoint={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    found = json.loads((tmp_path / "run" / "eval" / "test" / "summary.json").read_text())
    for key in ("accuracy", "questions", "accuracy_by_type", "perceptions", "teacher_forced"):
        assert found[key] == said[key]
    for picture in ("curves.png", "samples.png", "eval/test/samples.png"):
        assert (tmp_path / "run" / picture).stat().st_size > 10_000


@pytest.mark.parametrize(
    "strategy", ["single", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("fsdp", marks=pytest.mark.slow)]
)
def test_the_trained_model_is_gone_before_it_is_read_back(tmp_path, monkeypatch, strategy):
    """A GPU that one model fills has no room for two."""
    trained_models, read = [], []

    def building(*arguments):
        built = build_training(*arguments)
        trained_models.append(weakref.ref(built[0].model))
        return built

    def reading(path, **options):
        read.append([model() is None for model in trained_models])
        return load_pretrained(path, **options)

    monkeypatch.setattr("vpt.training.trainer.build_training", building)
    monkeypatch.setattr("vpt.cli.train.load_pretrained", reading)
    train(compose_config(*SMALL, f"strategy={strategy}", "training.steps=2"), tmp_path / "run")
    assert read == [[True]]


def test_a_broken_image_in_a_worker_ends_in_one_message(tmp_path):
    record = {"messages": [{"role": "user", "content": "<image>\nwhat?"}, {"role": "assistant", "content": "red"}]}
    (tmp_path / "broken.png").write_text("no image")
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([record | {"images": ["broken.png"]}]))
    overrides = ("data=vpt", f"data.root={tmp_path}", "+debug=two_steps", "data.workers=1")
    with pytest.raises(DataError, match=r"^\S+train.json: record 0: image \S+broken.png cannot be read"):
        Trainer(compose_config(*overrides), tmp_path / "run").fit()
