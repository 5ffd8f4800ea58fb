"""Runs that learn by reward: one loop, exact resuming, any split over micro-batches and processes, early refusals."""

import json
import shutil

import pytest
import torch

from conftest import compose_config, logged, losses
from helpers.multiprocess import on_ranks
from vpt.checkpoint.load import load_pretrained
from vpt.errors import CheckpointError, ConfigError, TrainingError
from vpt.rl.rewards import RewardSum
from vpt.training.trainer import Trainer

OWN = "rl.rewards.short.target=helpers.example_rewards.few_tokens"
SMALL = (
    "+experiment=all", "+debug=two_steps", "tracking=none", "masking=none", "rl.algorithm=dr_grpo", "rl.num_generations=4",
    "training.batch_size=8", "training.micro_batch_size=8", "training.steps=4", "generation.max_new_tokens=6",
    "rl.mask_truncated_completions=false", "data.limit=4", "+rewards=[correct,cost,malformed]", f"+{OWN}",
)  # fmt: skip


def configured(run, *overrides):
    return compose_config(*SMALL, f"init_from={run}", *overrides)


def fitted(folder, run, *overrides, world=None):
    trainer = Trainer(configured(run, *overrides), folder, world)
    trainer.fit()
    return trainer


def on_rank(world, folder, run, overrides):
    fitted(folder, run, *overrides, world=world)
    return [[line["train/loss"], line["train/grad_norm"]] for line in logged(folder, "train/loss")]


@pytest.fixture(scope="module")
def whole(tmp_path_factory, trained_run):
    return fitted(tmp_path_factory.mktemp("whole") / "run", trained_run)


def test_the_loss_of_a_fresh_policy(whole):
    """Rewards differ within groups, so there is a gradient; rollout and training have the same log-probabilities."""
    lines = logged(whole.folder, "rl/reward")
    assert len(lines) == 4
    for line in lines:
        assert line["rl/log_prob_difference/max"] < 1e-4
        assert line["rl/clip_ratio/low"] == line["rl/clip_ratio/high"] == 0
        assert "rl/kl" not in line, "there is no reference"
        assert line["rl/reward_std"] > 0 and line["train/grad_norm"] > 0
        by_type = [value for name, value in line.items() if name.startswith("rl/look_rate/type/")]
        assert len(by_type) in (0, 2) and min(by_type, default=0) <= line["rl/look_rate"] <= max(by_type, default=1)
        assert line["rl/completions/length"] > 0


@pytest.mark.parametrize(
    "overrides",
    [
        ["training.micro_batch_size=3"],
        pytest.param(["rl.share_prompts=false"], marks=pytest.mark.slow),
        pytest.param(["generation.batch_size=4"], marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_how_a_step_is_cut_changes_nothing(tmp_path, whole, trained_run, overrides):
    other = fitted(tmp_path / "run", trained_run, *overrides, "training.steps=2")
    for a, b in zip(logged(whole.folder, "train/loss"), logged(other.folder, "train/loss")):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-4, abs=1e-6)
        assert b["train/grad_norm"] == pytest.approx(a["train/grad_norm"], rel=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize(("processes", "overrides"), [
    (2, ["strategy=ddp"]), (4, ["strategy=ddp"]), (2, ["strategy=fsdp"]), (4, ["strategy=fsdp"]),
    (2, ["strategy=fsdp", "rl.beta=0.1", "optim.lr=1e-3"]),
    (2, ["strategy=fsdp", "rl.beta=0.1", "model.lora.rank=2", "strategy.reshard_after_forward=false"]),
], ids=str)  # fmt: skip
def test_several_processes(tmp_path, trained_run, processes, overrides):
    """Their rollouts, loss and gradient are those of one process, though under FSDP each holds a slice of each weight. Of
    four processes, two have no group of their own.
    """
    short = ["training.steps=3", *overrides]
    whole = fitted(tmp_path / "one", trained_run, *(item for item in short if not item.startswith("strategy")))
    found = on_ranks(processes, on_rank, tmp_path / "run", trained_run, short, folder=tmp_path)
    want = [[line["train/loss"], line["train/grad_norm"]] for line in logged(whole.folder, "train/loss")]
    for (loss, norm), (own_loss, own_norm) in zip(want, found[0], strict=True):
        assert own_loss == pytest.approx(loss, rel=1e-4, abs=1e-6)
        assert own_norm == pytest.approx(norm, rel=1e-4)
    differences = [line["rl/log_prob_difference/max"] for line in logged(tmp_path / "run", "rl/reward")]
    assert len(differences) == 3 and max(differences) < 1e-4


class Dropped(Exception):
    """What ends a run without a word."""


@pytest.mark.parametrize(
    "place", ["rolling out", *(pytest.param(p, marks=pytest.mark.slow) for p in ("before the step", "saving"))]
)
def test_killed_anywhere_it_goes_on_with_the_same_losses(tmp_path, whole, trained_run, place):
    trainer = Trainer(configured(trained_run), tmp_path / "run")
    name, owner = {
        "rolling out": ("_draw_groups", trainer.objective), "before the step": ("train_step", trainer),
        "saving": ("save", trainer),
    }[place]  # fmt: skip
    method, calls = getattr(owner, name), []

    def stopping(*arguments):
        calls.append(1)
        if len(calls) == 3:
            raise Dropped
        return method(*arguments)

    setattr(owner, name, stopping)
    with pytest.raises(Dropped):
        trainer.fit()
    again = fitted(tmp_path / "run", trained_run)
    assert losses(again.folder) == losses(whole.folder)
    state, want = again.model.state_dict(), whole.model.state_dict()
    assert all(torch.equal(state[key], want[key]) for key in want)


def test_several_steps_of_one_draw(tmp_path, trained_run):
    """Ratios leave 1 from the second step on; checkpoints wait for the end of a draw, so that a run resumes exactly."""
    overrides = ("rl.num_iterations=2", "optim.lr=1e-2", "optim.warmup_ratio=0")
    trainer = fitted(tmp_path / "run", trained_run, *overrides)
    differences = [line["rl/log_prob_difference/max"] for line in logged(trainer.folder, "rl/reward")]
    assert differences[0] < 1e-4 < differences[1]
    assert differences[2] < 1e-4 < differences[3]
    steps = sorted(path.name for path in (trainer.folder / "checkpoints").glob("step_*"))
    assert steps == ["step_00000002", "step_00000004"]


def test_what_rollouts_hang_on_may_not_change(tmp_path, trained_run):
    fitted(tmp_path / "run", trained_run, "rl.beta=0.1")
    configuration = configured(trained_run, "rl.beta=0.1", "generation.batch_size=3")
    assert Trainer(configuration, tmp_path / "run").state.step
    elsewhere = shutil.copytree(trained_run, tmp_path / "elsewhere", symlinks=True)
    for change in ("generation.max_new_tokens=7", f"init_from={elsewhere}"):
        with pytest.raises(CheckpointError, match=change.partition("=")[0]):
            Trainer(configured(trained_run, "rl.beta=0.1", change), tmp_path / "run")


SLOW = [pytest.param(name, marks=pytest.mark.slow) for name in ("gspo", "cispo", "rloo", "rft", "dapo")]


@pytest.mark.parametrize("algorithm", ["grpo", "dpo", *SLOW])
def test_every_algorithm_trains(tmp_path, trained_run, algorithm):
    overrides = ["rl.beta=0.1"] if algorithm in ("dpo", "grpo") else []
    overrides += ["rl.max_resamples=1", "rl.epsilon_high=0.28"] if algorithm == "dapo" else []
    overrides += ["rl.rewards.short.options.scale=-1"] if algorithm == "rft" else []
    trainer = fitted(tmp_path / "run", trained_run, f"rl.algorithm={algorithm}", "training.steps=1", *overrides)
    [line] = logged(trainer.folder, "train/grad_norm")
    assert line["train/grad_norm"] > 0
    if algorithm == "grpo":
        assert abs(line["rl/kl"]) < 1e-6, "the policy is still the reference"


@pytest.mark.parametrize("overrides", [(), ("model.lora.rank=2", "model.lora.alpha=8")], ids=["full", "lora"])
def test_the_reference_stays_what_the_run_began_as(tmp_path, trained_run, overrides):
    """Its log-probabilities are those of `init_from` itself after steps that changed the policy; and it holds no more than
    the weights that are trained."""
    high = ("rl.beta=0.1", "optim.lr=0.05", "optim.warmup_ratio=0", "training.steps=2", *overrides)
    trainer = fitted(tmp_path / "run", trained_run, *high)
    batch = next(trainer.objective.batches(0))[0]
    began = load_pretrained(str(trained_run), device="cpu").model.eval()
    with torch.no_grad():
        want, policy = -began(batch).nll, -trainer.model(batch).nll
    reference = trainer.objective.reference
    assert torch.allclose(reference.log_probs(batch), want, atol=1e-5)
    assert torch.allclose(batch.rollouts.ref_log_probs, want, atol=1e-5) and not torch.allclose(policy, want, atol=1e-2)
    trained = {name for name, parameter in trainer.model.named_parameters() if parameter.requires_grad}
    assert reference.weights.keys() == trained


def test_rollouts_are_written_for_the_report(whole):
    lines = [json.loads(line) for line in (whole.folder / "rollouts.jsonl").read_text().splitlines()]
    assert {line["step"] for line in lines} == {1, 2, 3, 4}
    assert all({"question", "answer", "reward", "advantage", "trace"} <= line.keys() for line in lines)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["init_from=null"], "init_from="),
        (["generation.top_p=0.9"], "generation.top_p=1"),
        (["generation.top_k=5"], "generation.top_k=0"),
        (["masking=light"], "masking=none"),
        (["rl.rewards=null"], "rewards"),
        (["training.batch_size=6"], "multiple"),
        (["rl.num_iterations=3"], "multiple"),
        (["rl.num_generations=1"], "num_generations"),
        (["rl.temperature=0"], "temperature"),
        (["rl.algorithm=dpo"], "rl.beta"),
        (["rl.algorithm=grop"], "grpo"),
        (
            ["encoder=[]", "model.region_bins=0", "data.actions={none: 1, region: 0, dino: 0, sam: 0, clip: 0}"],
            "perception tokens",
        ),
        (["rl.rewards.short.target=helpers.example_rewards.fewer"], "helpers.example_rewards.fewer"),
        (["+rl.rewards.short.options.scael=2"], "scael"),
        (["rl.rewards.correct.options.metric=cider_d"], "cider_d"),
        (["+rl.rewards.cost.options.weight=1"], "weight"),
    ],
    ids=str,
)
def test_what_cannot_run_is_refused_early(trained_run, overrides, said):
    with pytest.raises(ConfigError, match=said):
        RewardSum(configured(trained_run, *overrides).rl.rewards)


@pytest.mark.parametrize(("function", "said"), [("not_a_number", "nan for "), ("too_few", "1 values for 4 rollouts")])
def test_a_reward_that_is_wrong_is_named(tmp_path, trained_run, function, said):
    with pytest.raises(TrainingError, match=f"rl.rewards.short .*{said}"):
        fitted(tmp_path / "run", trained_run, f"rl.rewards.short.target=helpers.example_rewards.{function}")
