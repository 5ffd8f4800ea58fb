"""What a run says about itself: true numbers, the same in metrics.jsonl and at W&B, over declared axes."""

import json
import math
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from conftest import ROOT, compose_config
from helpers import wandb_file
from helpers.multiprocess import on_ranks
from vpt.cli.train import train
from vpt.flops import FlopMeter
from vpt.tracking import GROUPS
from vpt.training.optimizer import module_of
from vpt.training.trainer import Trainer
from vpt.utils.version import code_version

SMALL = ("+experiment=all", "+debug=two_steps", "training.log_every=1", "training.batch_size=8", "training.micro_batch_size=4",
         "data.limit=4")  # fmt: skip


def lines(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_an_offline_run_holds_what_was_logged(tmp_path):
    config = compose_config(*SMALL, "tracking=wandb", "tracking.mode=offline", "masking=paper", "pictures=true")
    train(config, tmp_path / "run")
    kept, written = wandb_file.read(tmp_path / "run"), lines(tmp_path / "run")
    logged = [{k: v for k, v in item.items() if not k.startswith("_")} for item in kept["history"]]
    history = [item for item in logged if "step" in item]
    assert history == written
    assert kept["metrics"]["step"] == ("",)
    assert all(kept["metrics"][f"{group}/*"] == ("step",) for group in GROUPS)
    assert kept["metrics"]["eval/loss"] == ("step", "min")
    assert {name.split("/")[0] for line in written for name in line} - {"step"} <= {*GROUPS}
    assert kept["config"]["training"]["batch_size"] == 8 and kept["config"]["code"] == code_version()
    [shown] = [item for item in logged if "step" not in item]
    tables = [name for name in shown if shown[name] == "table-file"]
    assert tables and all(shown[f"{name.removesuffix('_type')}nrows"] for name in tables)


def test_a_resumed_run_goes_on_in_the_same_one(tmp_path):
    """Steps that are done again are logged again: W&B's own count would have dropped them."""
    config = compose_config(
        *SMALL, "tracking=wandb", "tracking.mode=offline", "training.steps=5", "training.checkpoint_every=2"
    )
    trainer = Trainer(config, tmp_path / "run")
    step = trainer.train_step

    def stopping(batches, number):
        if number == 3:
            raise KeyError("dropped")
        return step(batches, number)

    trainer.train_step = stopping
    with pytest.raises(KeyError, match="dropped"):
        trainer.fit()
    trainer.run_logger.close()
    again = Trainer(config, tmp_path / "run")
    again.fit()
    again.run_logger.close()
    kept = wandb_file.read(tmp_path / "run")
    assert len(kept["ids"]) == 2 and len(set(kept["ids"])) == 1
    steps = [item["step"] for item in kept["history"] if "train/loss" in item]
    assert steps == [1, 2, 3, 3, 4, 5]


TRACKED = """
import sys
from pathlib import Path
from vpt.config.schema import TrackingConfig
from vpt.tracking import build_tracker
tracker = build_tracker(TrackingConfig(), name="mine", folder=Path(sys.argv[1]), run_id="before", settings={})
tracker.log({"train/loss": 1.0}, step=1)
tracker.close()
print(tracker.run.disabled, tracker.id, tracker.run.project, tracker.run.name)
"""


def test_wandb_goes_by_its_own_environment(tmp_path):
    """Mode, project, the key of a server of one's own in NETRC; a server that is not there leaves the run offline."""
    with socket.socket() as unused:  # bound, so that nobody else listens there
        unused.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{unused.getsockname()[1]}"
        (tmp_path / "keys").write_text(f"machine {address}\n login user\n password {'k' * 40}\n")
        server = {"WANDB_BASE_URL": f"http://{address}", "NETRC": str(tmp_path / "keys")}
        given = {
            "gone": server | {"WANDB_PROJECT": "theirs"},
            "offline": server | {"WANDB_MODE": "offline"},
            "disabled": server | {"WANDB_MODE": "disabled"},
        }
        plain = {name: value for name, value in os.environ.items() if not name.startswith("WANDB_")}
        started = {
            name: subprocess.Popen(
                [sys.executable, "-c", TRACKED, tmp_path / name], cwd=ROOT, env=plain | more, text=True,
                stdout=subprocess.PIPE,
            )
            for name, more in given.items()
        }  # fmt: skip
        said = {name: process.communicate(timeout=100)[0].splitlines() for name, process in started.items()}
    assert all(process.returncode == 0 for process in started.values())
    assert said["disabled"] == ["True before vpt mine"]
    assert said["offline"][-1] == "False before vpt mine" and said["gone"][-1] == "False before theirs mine"
    assert len(said["offline"]) == 2 and said["gone"][0].startswith("W&B: goes on offline, Failed to authenticate")
    for name in ("offline", "gone"):
        [run] = (tmp_path / name / "wandb").glob("offline-run-*-before")
        assert said[name][-2] == f"W&B: this run is offline in {run}; to send it: wandb sync {run}"


@pytest.fixture(scope="module")
def step(tmp_path_factory):
    """A trainer, the batches of its first step, their outputs and gradients, and what it logged."""
    config = compose_config(*SMALL, "masking.para_mask_id=1", "masking.para_mask_ratio=0.5", "tracking=none",
                            "data.actions={none:1,region:1,dino:2,sam:2,clip:2}", "optim.lr_scale={encoders.*: 0.5}")  # fmt: skip
    trainer = Trainer(config, tmp_path_factory.mktemp("runs") / "run")
    batches, outputs, forward = trainer.objective.dataset[0], [], trainer.strategy
    norms = {}

    class Watching:
        name, grad_sync = forward.name, staticmethod(forward.grad_sync)

        def __call__(self, batch):
            outputs.append(forward(batch))
            return outputs[-1]

    clip = trainer._clip_gradients

    def watching():
        for group in trainer.optimizer.param_groups:
            for name, p in zip(group["names"], group["params"]):
                if p.grad is not None:
                    norms[module_of(name)] = norms.get(module_of(name), 0.0) + float(p.grad.double().square().sum())
        return clip()

    trainer.strategy, trainer._clip_gradients = Watching(), watching
    return trainer, batches, outputs, norms, trainer.train_step(batches, 0).metrics


def test_gradient_norms_are_those_of_the_modules(step):
    _, _, _, norms, metrics = step
    shown = {name.removeprefix("train/grad_norm/"): value for name, value in metrics.items()
             if name.startswith("train/grad_norm/")}  # fmt: skip
    assert len(shown) == 7
    for part, value in shown.items():
        assert value == pytest.approx(math.sqrt(norms.get(part, 0.0)), rel=1e-5)
    assert metrics["train/grad_norm"] == pytest.approx(math.sqrt(sum(v**2 for v in shown.values())), rel=1e-5)


def test_rates_by_group(step):
    trainer, _, _, _, metrics = step
    assert metrics["train/lr/x0.5"] == pytest.approx(metrics["train/lr"] / 2)
    assert metrics["train/lr"] == metrics["train/lr/x1"]
    assert {group["lr"] for group in trainer.optimizer.param_groups} == {
        metrics["train/lr"], metrics["train/lr/x0.5"]
    }  # fmt: skip


def test_perception_is_counted_as_it_was(step):
    trainer, batches, outputs, _, metrics = step
    rows = [row for batch in batches for row in batch.rows]
    acting = [row for row in rows if row.actions]
    assert acting and 0 < metrics["masking/fraction_of_action_rows"] == sum(bool(r.masked) for r in acting) / len(
        acting
    )
    assert metrics["masking/fraction"] == sum(bool(r.masked) for r in rows) / len(rows)
    assert metrics["perception/actions_per_row"] == sum(len(r.actions) for r in rows) / len(rows)
    states = torch.cat([out.control_states for out in outputs])
    assert metrics["perception/control_state_norm"] == pytest.approx(
        float(states.detach().norm(dim=-1).mean()), rel=1e-5
    )
    targets, hits = (torch.cat([getattr(out, name) for out in outputs]) for name in ("targets", "correct"))
    for token, name in trainer.model.vocabulary.perception_ids().items():
        right = hits[targets == token]
        assert metrics.get(f"perception/accuracy/{name}") == (float(right.double().mean()) if len(right) else None)


def test_mfu_is_the_work_of_the_formulas_over_the_peak(step):
    trainer, batches, _, _, metrics = step
    speed = trainer.step_metrics.throughput(metrics, tokens=100, waited=1.0, took=4.0)
    flops = sum(cost.useful for batch in batches for cost in FlopMeter(trainer.model).step(batch).values())
    assert speed["perf/mfu"] == pytest.approx(flops / (4.0 * trainer.step_metrics.peak))
    assert (speed["perf/tokens_per_second"], speed["perf/samples_per_second"]) == (25, 2)
    assert speed["perf/data_wait_fraction"] == 0.25 and speed["perf/peak_memory_gib"] > 0.1


def test_logging_changes_nothing(tmp_path):
    """Weights are the same to the last bit however often a run is logged."""
    weights = []
    for every in (1, 100):
        trainer = Trainer(compose_config(*SMALL, "tracking=none", f"training.log_every={every}"), tmp_path / f"{every}")
        trainer.fit()
        weights.append(trainer.model.state_dict())
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def _logged(world, folder: str, strategy: str) -> list[dict]:
    config = compose_config(*SMALL, "tracking=none", f"strategy={strategy}", "training.eval_rows=0")
    Trainer(config, Path(folder), world).fit()
    return lines(Path(folder)) if world.is_main else []


@pytest.mark.parametrize("strategy", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_several_processes_say_what_one_would(tmp_path, strategy):
    alone = Trainer(compose_config(*SMALL, "tracking=none", "training.eval_rows=0"), tmp_path / "alone")
    alone.fit()
    together, _ = on_ranks(2, _logged, str(tmp_path / "both"), strategy, folder=tmp_path)
    for one, two in zip(lines(tmp_path / "alone"), together, strict=True):
        assert one.keys() == two.keys()
        same = {name: value for name, value in one.items() if not name.startswith("perf/")}
        assert {name: two[name] for name in same} == pytest.approx(same, rel=1e-3, abs=1e-6)
