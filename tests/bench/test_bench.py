"""The bench runs to its end, at sizes that say nothing."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import ROOT
from helpers.programs import run_program
from vpt.bench import generation, inner_passes, loading, measure, memory, mfu, models, packing, rollouts, vision
from vpt.bench.__main__ import GROUPS, main
from vpt.bench.measure import Measurement, Ratio, time_in_turns, worst_of
from vpt.bench.memory import peak_bytes
from vpt.data.synthetic import WORD, SyntheticRow, synthetic_batch

FIGURES = {
    "inner_passes": {"shared_vs_plain", "full_vs_shared", "bottleneck_vs_plain", "zero_vs_plain"},
    "packing": {"packed_vs_padded", "labelled_logits_memory"},
    "mfu": {"step_vs_matmul", "growth", "growth.rows", "growth.length"},
    "memory": {"checkpointing_time", "checkpointing_memory"},
    "generation": {"decode_vs_transformers", "decode_vs_transformers.batch_1", "decode_vs_transformers.batch_8",
                  "perceive_vs_prefill"},
    "rollouts": {"rl_shared_vs_separate", "rl_prefill_shared"},
    "vision": {"vision_tower", "cached_features"},
    "loading": {"loader_wait"},
}  # fmt: skip


@pytest.fixture
def tiny(monkeypatch):
    """The same measurements with small models, in one round."""
    small = replace(models.SMALL, qwen=models.qwen_sizes(32, 2, 2, intermediate_size=32), new_tokens=3)
    for module in (models, memory, packing, mfu, generation, rollouts, vision, inner_passes):
        monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(vision, "BASE_DINO", models.SMALL_DINO)
    monkeypatch.setattr(packing, "PUBLISHED_VOCABULARY", 1000)
    monkeypatch.setattr(mfu, "MATMUL", 64)
    monkeypatch.setattr(vision, "IMAGES", 4)
    monkeypatch.setattr(vision, "TOWER", {**vision.TOWER, "depth": 1, "embed_dim": 32})
    for module, name, value in (
        (loading, "STEPS", 3),
        (loading, "WARM_UP", 1),
        (measure, "ROUNDS", 1),
        (measure, "MOST_ROUNDS", 1),
    ):
        monkeypatch.setattr(module, name, value)
    return small.build()


def test_every_group_is_tested():
    assert list(FIGURES) == list(GROUPS)


@pytest.mark.parametrize("group", FIGURES)
def test_runs_to_its_end(group, tiny, tmp_path, monkeypatch):
    if group == "loading":
        pytest.importorskip("easy_vqa")
    out = tmp_path / "outputs" / "bench.json"
    monkeypatch.setattr(sys, "argv", ["bench", group, "--out", str(out)])
    main()
    written = json.loads(out.read_text())
    assert {figure["name"] for figure in written} == FIGURES[group]
    for figure in written:
        assert set(figure) == {"name", "value", "low", "high", "bound", "better", "ok"}
        assert figure["value"] > 0 or figure["name"] == "loader_wait"


def test_figures_know_their_bounds():
    assert Measurement("a", 1.0, 1.0).ok
    assert not Measurement("a", 1.1, 1.0).ok
    assert Measurement("a", 1.0, 1.0, "higher").ok
    assert not Measurement("a", 0.9, 1.0, "higher").ok
    low, high = Ratio(0.9, 0.8, 1.0), Ratio(1.2, 1.1, 1.3)
    whole, *parts = worst_of("a", {"x": low, "y": high}, bound=1.0, better="higher")
    assert (whole.value, [part.name for part in parts]) == (low, ["a.x", "a.y"])
    assert [part.ok for part in parts] == [False, True]
    assert not Measurement("a", Ratio(0.9, 0.8, 1.1), 1.0).ok  # not all of its interval
    assert Ratio.of([1.0, 4.0, 9.0], [1.0, 2.0, 3.0]) == Ratio(2.0, 1.0, 3.0)


def test_intervals_of_medians_hold_what_they_say():
    """Of twelve values the third and the tenth: the median of what they come from lies between in 0.961 of all cases."""
    assert Ratio.median(range(12)) == Ratio(5.5, 2, 9)
    assert Ratio.median(range(5)) == Ratio(2, 0, 4) and Ratio.median(range(6)) == Ratio(2.5, 0, 5)
    drawn = np.random.default_rng(0).lognormal(size=(4000, 12))
    found = [Ratio.median(row) for row in drawn]
    assert 0.95 < np.mean([each.low <= 1.0 <= each.high for each in found]) < 0.97


def test_rounds_end_once_ratios_are_known(monkeypatch):
    clock = iter([1.0, 2.0] * 7 + [1.0, 3.0, 1.0, 2.0] * 100)
    monkeypatch.setattr(measure, "timed", lambda side: next(clock))
    sides = {"a": lambda: None, "b": lambda: None}
    assert {name: len(times) for name, times in time_in_turns(sides).items()} == {"a": 7, "b": 7}
    assert len(time_in_turns(sides)["a"]) == measure.MOST_ROUNDS
    assert len(time_in_turns(sides, rounds=3)["a"]) == 3


def test_peak_memory_is_that_of_the_tensors():
    def hold_two_of_three():
        first = torch.zeros(1000, dtype=torch.uint8)
        second = torch.zeros(2000, dtype=torch.uint8)
        del first
        return second + torch.zeros(1, dtype=torch.uint8)

    assert 4000 <= peak_bytes(torch.nn.Linear(1, 1), hold_two_of_three) <= 4400


def test_peak_memory_does_not_depend_on_what_was_measured_before(tiny):
    step = measure.training_step(tiny.model, synthetic_batch(tiny.processor, [SyntheticRow()]))
    peaks = [peak_bytes(tiny.model, step) for _ in range(3)]
    assert max(peaks) <= 1.02 * min(peaks)


def test_rows_are_as_long_as_they_say(tiny):
    """64 image, 40 question, 256 re-encoded, 30 answer tokens; a mix of 80 to 900; padding changes no loss."""
    model = tiny.model
    batch = synthetic_batch(tiny.processor, [models.ROW])
    assert [block.length for block in batch.rows[0].blocks] == [64, 256]
    word = tiny.tokenizer.encode(WORD)
    assert len(word) == 1 and batch.input_ids.tolist().count(word[0]) == 40 + 30
    mix = synthetic_batch(tiny.processor, packing.MIX)
    lengths = [row.length for row in mix.rows]
    assert 70 <= min(lengths) <= 90
    assert 880 <= max(lengths) <= 920
    padded = packing.pad(mix)
    assert len(padded.input_ids) == len(lengths) * max(lengths)
    with torch.no_grad():
        torch.testing.assert_close(model(padded).nll, model(mix).nll, rtol=1e-5, atol=2e-6)
        everywhere = packing.loss_of_all_logits(model, mix)
        torch.testing.assert_close(everywhere, model(mix).loss_sum, rtol=1e-5, atol=1e-5)


# The bench runs where only torch and transformers are, and says what it cannot measure. What it imports at once:
# tests/test_imports.py.
WITHOUT_HYDRA = """
import sys
sys.modules |= dict.fromkeys(("hydra", "omegaconf", "wandb"))
from vpt.bench import __main__ as bench, generation, inner_passes, packing, mfu, memory
from vpt.bench.gpu.__main__ import main
print(bench.measure(["loading"]))
main()
"""


def gpu_bench(program: list[str], parts: list[str], folder: Path) -> tuple[str, dict]:
    """What the bench prints and finds at toy sizes on the CPU; `program` is what python runs, the module by default."""
    arguments = [*parts, "--tiny", "--out", str(folder / "gpu.json")]
    if program:
        command = [sys.executable, *program, *arguments]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=300)
    else:
        done = run_program("-m", "vpt.bench.gpu", *arguments)
    assert done.returncode == 0, done.stderr
    found = json.loads((folder / "gpu.json").read_text())
    assert [pace["rows"] for pace in found["train_2b"]["paces"]] == [1, 2]
    assert 0 < sum(found["train_2b"]["profile"].values()) <= 1.001
    assert (folder / "gpu.profile.txt").read_text()
    return done.stdout, found


@pytest.mark.parametrize("program", [[], pytest.param(["-c", WITHOUT_HYDRA], marks=pytest.mark.slow)], ids=len)
def test_gpu_bench_runs_to_its_end(program, tmp_path):
    """So that it does where there is a GPU."""
    said, found = gpu_bench(program, ["train_2b", "decode_2b"], tmp_path)
    assert found["processes"] == 1 and set(found["decode_2b"]) == {"batch_1", "batch_2"}
    assert not program or ("loading: not measured, hydra is missing" in said and "\n[]\n" in said)


@pytest.mark.slow
def test_gpu_bench_of_two_processes(tmp_path):
    pytest.importorskip("peft")
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node=2", "--standalone", "-m", "vpt.bench.gpu"]
    _, found = gpu_bench(torchrun, ["train_2b", "compiled_2b", "lora_7b", "decode_2b"], tmp_path)
    assert found["processes"] == 2 and {"train_2b", "compiled_2b", "lora_7b"} <= found.keys()
