"""Many processes compute what one computes: gradients on the hardest mixtures, and whole runs."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from conftest import ROOT, compose_config, compose_eval, logged, losses, samples_of
from helpers.multiprocess import PATIENCE, on_ranks, rank_environments
from helpers.programs import Program
from vpt.cli.evaluate import evaluate_checkpoint
from vpt.data.balance import SampleCost, balance
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import World
from vpt.distributed.strategy import build_strategy
from vpt.errors import ConfigError
from vpt.evaluation.predictions import read_predictions
from vpt.perception.batch import Batch
from vpt.training.trainer import Trainer

STRATEGIES = {
    "ddp": ["strategy=ddp"],
    "fsdp": ["strategy=fsdp"],
    "hybrid": ["strategy=hybrid", "strategy.shard_size=2"],
}
# Wider weights let (f . c) c amplify float32's rounding from step to step.
MODEST = ["model.config.initializer_range=0.04", "model.config.vision_config.initializer_range=0.04"]
QUIET = ["+debug=two_steps", "training.eval_every=0", "training.checkpoint_every=1000", "optim.max_grad_norm=0"]
EVERYTHING = ["+experiment=all", *QUIET]
FROZEN = ["optim.freeze=['*']"]

# What is trained, and for each micro-batch which of `mixed_records` each of two processes holds: 0 three actions,
# 1 clip, 2 region, 3 region and sam, 4 an image, 5 text alone, 6 dino, 7 sam.
CASES = {
    "text beside three actions; no rows beside sam": (EVERYTHING, [[[5], [0, 6]], [[7], []]]),
    "every kind of row": (EVERYTHING, [[[0, 1, 2], [3, 4, 5, 6, 7]]]),
    "no image anywhere": (EVERYTHING, [[[5], [5]], [[5], []]]),
    "recomputed layers": (
        [*EVERYTHING, "model.activation_checkpointing=true", "strategy.reshard_after_forward=false"], [[[5], [0]], [[], [3]]],
    ),
    "several control tokens, whole passes": (
        [*EVERYTHING, "model.projector_scale=2", "model.inner_forward=full"], [[[5], [0, 3]]],
    ),
    "several control tokens, shared": ([*EVERYTHING, "model.projector_scale=3"], [[[4], [0]], [[1], [2]]]),
    "projectors alone, one pass": (
        [*EVERYTHING, *FROZEN, "optim.unfreeze=['*.projector.*']", "model.num_inner_forward_run=1"],
        [[[5], [0]], [[1], [7]]],
    ),
    "conditions alone": ([*EVERYTHING, *FROZEN, "optim.unfreeze=['*condition*']"], [[[5], [0]], [[1], [4]]]),
}  # fmt: skip


def gradients(world: World, case: str, strategy: str, root: str, to: str) -> float:
    """Save the gradients of one step of a case; return its loss."""
    overrides, rounds = CASES[case]
    trainer = Trainer(compose_config(*overrides, *STRATEGIES.get(strategy, [])), Path(to).parent / "run", world)
    samples = samples_of(trainer.bundle, MediaStore(Path(root)))
    if world.size == 1:
        rounds = [[[row for shares in rounds for share in shares for row in share]]]
    mine = [shares[world.rank] for shares in rounds]
    found = {}

    def keep() -> None:
        named = ((n, p.grad) for n, p in trainer.model.named_parameters() if p.grad is not None)
        found.update({name: full_tensor(grad).clone() for name, grad in named})

    trainer.optimizer.step = keep
    batches = [collate([samples[row] for row in share]) if share else Batch.empty() for share in mine]
    result = trainer.train_step(batches, 0)
    if world.is_main:
        save_file(found, to)
    return result.loss


def all_gradients(world: World, cases: list[tuple[str, str]], root: str, to: str) -> list[float]:
    return [gradients(world, *case, root, f"{to}/{number}.safetensors") for number, case in enumerate(cases)]


@pytest.mark.parametrize("share", [slice(1), pytest.param(slice(1, None), marks=pytest.mark.slow)])
def test_gradients_equal_those_of_one_process(folder, tmp_path, share):
    """Whatever falls to which process: no image, no action, no row, another encoder than the next."""
    cases = [(case, strategy) for case in list(CASES)[share] for strategy in ("fsdp", "ddp")]
    losses = on_ranks(2, all_gradients, cases, str(folder.root), str(tmp_path), folder=tmp_path)
    assert losses[0] == losses[1]
    for number, (case, strategy) in enumerate(cases):
        loss = gradients(World(), case, "single", str(folder.root), str(tmp_path / "one.safetensors"))
        assert losses[0][number] == pytest.approx(loss, rel=1e-6), (case, strategy)
        one, many = load_file(tmp_path / "one.safetensors"), load_file(tmp_path / f"{number}.safetensors")
        assert one.keys() <= many.keys(), (case, strategy)
        for name in many.keys() - one.keys():  # a part that no row reaches with a loss
            assert not many[name].any(), (case, strategy, name)
        for name, gradient in one.items():
            error = (gradient - many[name]).abs().max() / (gradient.abs().max() + 1e-4)
            assert error < 1e-4, (case, strategy, name, error)


def run(world: World, experiment: str, strategy: str, steps: int, to: str) -> None:
    config = compose_config(
        f"+experiment={experiment}", "+debug=two_steps", f"training.steps={steps}", "training.checkpoint_every=1000",
        "training.batch_size=6", "training.micro_batch_size=2", f"training.eval_every={steps - 1}", "tracking=none",
        "init_from=null", *MODEST, *STRATEGIES.get(strategy, []),
    )  # fmt: skip
    trainer = Trainer(config, Path(to), world)
    trainer.fit()


def runs(world: World, plan: list[tuple[str, str]], steps: int, to: str) -> None:
    for experiment, strategy in plan:
        run(world, experiment, strategy, steps, f"{to}/{experiment}_{strategy}_{world.size}")


def results(folder: Path) -> list[dict]:
    """What was logged of training and evaluation, in order."""
    lines = sorted(logged(folder, "train/loss") + logged(folder, "eval/loss"), key=lambda line: line["step"])
    return [{key: value for key, value in line.items() if not key.startswith("perf/")} for line in lines]


def compare_runs(tmp_path: Path, plan: list[tuple[str, str]], *, size: int, steps: int) -> None:
    on_ranks(size, runs, plan, steps, str(tmp_path), folder=tmp_path)
    for experiment, strategy in plan:
        alone = tmp_path / f"{experiment}_single_1"
        if not alone.exists():
            run(World(), experiment, "single", steps, str(alone))
        one, many = results(alone), results(tmp_path / f"{experiment}_{strategy}_{size}")
        assert len(one) == len(many) == steps + 2  # the evaluation of the last step
        for before, after in zip(one, many, strict=True):
            assert before.keys() == after.keys()
            for key, value in before.items():
                worse_conditioned = key.startswith("train/grad_norm")
                close = pytest.approx(value, rel=1e-3 if worse_conditioned else 1e-5)
                assert after[key] == close, (experiment, strategy, before["step"], key)


def test_a_short_run_by_two(tmp_path):
    compare_runs(tmp_path, [("all", strategy) for strategy in STRATEGIES], size=2, steps=3)


def with_torchrun(*overrides: str) -> str:
    """What `train.py` prints under torchrun."""
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "train.py"]
    done = subprocess.run(
        [sys.executable, *torchrun, *overrides], cwd=ROOT, env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True, text=True, timeout=PATIENCE,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return done.stdout


def as_by_torchrun(*overrides: str) -> str:
    """The same of two processes that are told what torchrun tells its own."""
    programs = [Program("train.py", *overrides, environment=rank) for rank in rank_environments(2)]
    done = [program.wait(PATIENCE) for program in programs]
    assert not any(each.returncode for each in done), [each.stderr for each in done]
    return "".join(each.stdout for each in done)


@pytest.mark.parametrize("start", [as_by_torchrun, pytest.param(with_torchrun, marks=pytest.mark.slow)])
def test_the_program_by_two(tmp_path, start):
    """One voice, questions shared, and a checkpoint that answers the same in one process."""
    small = ["+experiment=dino", "+debug=two_steps", "strategy=fsdp", "training.final_eval_questions=5", "data.limit=5"]
    said = start(*small, f"output_dir={tmp_path}")
    assert said.count("accuracy") == 1 and "2 x cpu (fsdp)" in said
    run = tmp_path / "dino"
    evaluate_checkpoint(compose_eval(f"checkpoint={run}", "pictures=false"))
    shared, alone = (
        [(item.record, item.answer, item.actions) for item in read_predictions(run / place / "predictions.jsonl")]
        for place in ("predictions", "eval/test")
    )
    assert shared == alone and len(shared) == 5


def test_costs_are_spread_evenly():
    """Image-heavy rows first; no bin above its capacity; every row once."""
    costs = [float(cost) for cost in (*([1200] * 5), *([600] * 9), *([90] * 18))]
    bins = balance(costs, bins=8, capacity=4)
    assert sorted(index for chosen in bins for index in chosen) == list(range(32))
    loads = [sum(costs[index] for index in chosen) for chosen in bins]
    in_order = [sum(costs[start : start + 4]) for start in range(0, 32, 4)]
    best = 3 * 600 + 90  # three times, and five times 1200 + 3 * 90
    assert max(loads) < 1.05 * best and max(in_order) > 2.5 * best


def test_ranks_share_a_step_and_masking_counts(tmp_path):
    """Every row goes to one rank; shares weigh about the same in real tokens, masked rows twice."""
    overrides = ["+experiment=all", *QUIET, "training.batch_size=32", "training.micro_batch_size=4"]
    config = compose_config(*overrides, "masking.para_mask_ratio=1.0")
    alone = Trainer(config, tmp_path / "run")
    cost = SampleCost.estimate(
        alone.bundle.processor, alone.objective.dataset.mixture.sources, alone.objective.dataset.media
    )
    whole = [name for batch in alone.objective.dataset[0] for name in batch.ids]
    shares = [replace(alone.objective.dataset, rank=rank, ranks=4, cost=cost)[0] for rank in range(4)]
    assert sorted(name for share in shares for batch in share for name in batch.ids) == sorted(whole)
    assert [len(share) for share in shares] == [2] * 4
    weights = [sum((1 + bool(r.masked)) * r.length for r in batch.rows) for share in shares for batch in share]
    assert max(weights) < 1.15 * sum(weights) / len(weights)


def test_a_strategy_must_fit_the_processes():
    config = compose_config("strategy=hybrid", "strategy.shard_size=3").strategy
    model = torch.nn.Linear(1, 1)
    for kind, said in (("hybrid", "shard_size=3 does not divide the 4"), ("single", "for one process, 4 run")):
        with pytest.raises(ConfigError, match=said):
            build_strategy(replace(config, kind=kind), model, World(0, 4), torch.device("cpu"), precision="fp32")


def test_processes_of_torchrun_and_slurm():
    torchrun = {"RANK": "3", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "2", "SLURM_PROCID": "0"}
    assert World.from_environment(torchrun) == World(3, 8, 1, 2)
    batch_script = {"SLURM_PROCID": "0", "SLURM_NTASKS": "8", "SLURM_LOCALID": "0"}
    assert World.from_environment(batch_script) == World()
    srun = batch_script | {
        "SLURM_STEP_NUM_TASKS": "8", "SLURM_STEP_NUM_NODES": "2", "SLURM_PROCID": "5", "SLURM_LOCALID": "1",
        "MASTER_ADDR": "node1", "MASTER_PORT": "29400",
    }  # fmt: skip
    assert World.from_environment(srun) == World(5, 8, 1, 4, "node1:29400")


EXPERIMENTS = [path.stem for path in sorted((ROOT / "conf/experiment").glob("*.yaml"))]
SCENES = [f"scenes/{path.stem}" for path in sorted((ROOT / "conf/experiment/scenes").glob("*.yaml"))]
SCENES.remove("scenes/rl")  # it starts from a run that answers: tests/rl compares its processes


@pytest.mark.slow
@pytest.mark.parametrize("experiment", [*EXPERIMENTS, *SCENES])
def test_twenty_steps_of_every_experiment(tmp_path, experiment):
    """On two processes and on four, under every strategy."""
    for size in (2, 4):
        compare_runs(tmp_path, [(experiment, strategy) for strategy in STRATEGIES], size=size, steps=20)


FROZEN_TOWERS = ["+experiment=dino", *QUIET, "optim.freeze=['*visual*','*vision*']", "training.batch_size=4"]


def kept_features(world: World, to: str) -> list[int]:
    """Three runs: without a cache, one that fills it, and one in which rank 0 alone finds it full."""
    looked = []
    for name, store in (("none", None), ("filling", "shared"), ("uneven", "shared" if world.is_main else "own")):
        kept = [f"data.feature_cache={to}/{store}"] if store else []
        trainer = Trainer(compose_config(*FROZEN_TOWERS, *STRATEGIES["fsdp"], *kept), Path(to) / name, world)
        looked.append(
            sum(len(look.uncached) for batch in trainer.objective.dataset[0] for look in batch.images.values())
        )
        trainer.fit()
    return looked


def test_a_process_that_knows_all_its_images_keeps_step_with_one_that_knows_none(tmp_path):
    """Features that are kept on disk: whoever has them all still takes part when the tower is gathered."""
    (_, first, full), (_, other_first, empty) = on_ranks(2, kept_features, str(tmp_path), folder=tmp_path)
    assert first and other_first and not full and empty == other_first
    assert losses(tmp_path / "none") == losses(tmp_path / "filling")
    assert losses(tmp_path / "uneven") == pytest.approx(losses(tmp_path / "none"), rel=1e-6)


def in_half_precision(world: World, to: str) -> list[str]:
    """Two steps in bfloat16; what a layer's weight is while it runs, between steps, and its gradient."""
    name = "fsdp" if world.size > 1 else "single"
    overrides = [*EVERYTHING, "training.precision=bf16", f"strategy={name}"]
    trainer = Trainer(compose_config(*overrides), Path(to) / name, world)
    projection = trainer.model.language.layers[0].self_attn.q_proj
    types = []
    projection.register_forward_hook(lambda module, *_: types.append(module.weight.dtype))
    step = trainer.optimizer.step
    trainer.optimizer.step = lambda: (types.append(projection.weight.grad.dtype), step())
    trainer.fit()
    return [str(types[0]), str(projection.weight.dtype), str(next(t for t in reversed(types)))]


@pytest.mark.slow
def test_mixed_precision(tmp_path):
    """Sharded layers are gathered as bfloat16; weights, gradients and the optimizer stay float32."""
    for half, kept, gradient in on_ranks(2, in_half_precision, str(tmp_path), folder=tmp_path):
        assert (half, kept, gradient) == ("torch.bfloat16", "torch.float32", "torch.float32")
    in_half_precision(World(), str(tmp_path))
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "single"), rel=1e-2)
