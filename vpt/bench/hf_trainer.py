"""What Hugging Face's Trainer costs beside `train.py`, on the same rows: `python -m vpt.bench.hf_trainer`.

A base of 50 M parameters with random weights, rows of 110 to 1,150 tokens without perception. Each side trains to
its first checkpoint in a program of its own, is killed a step later, and goes on; the sides take turns. Their first
losses must agree.
"""

import argparse
import json
import random
import shutil
import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image

from vpt.bench.models import SMALL, TINY_QWEN
from vpt.bench.programs import ROOT, run_program
from vpt.bench.random_folders import write_folders
from vpt.config.schema import ModelConfig, TrainConfig
from vpt.utils.table import Table

ROWS, BATCH, STEPS = 400, 4, 12  # records, rows of a step, steps before the checkpoint
SIDES = {"vpt": ("train.py", "metrics.jsonl"), "transformers": ("-m vpt.bench.hf_side", "steps.jsonl")}
FEW = 0.7  # share of short questions
WORDS = ("red", "blue", "large", "small", "what", "where")


@dataclass(frozen=True)
class Side:
    """One round of one side: rows a second, peak bytes, seconds to the first step and from a restart to the next, and
    the first step's loss."""

    samples_per_second: float
    peak: float
    first_step: float
    resume: float
    loss: float


def write_rows(root: Path) -> None:
    """Records with pictures of noise; most have a short question about a small picture, some a long one."""
    drawn, lines = random.Random(0), []

    def words(least: int, most: int) -> str:
        return " ".join(drawn.choices(WORDS, k=drawn.randint(least, most)))

    for number in range(ROWS):
        few = drawn.random() < FEW
        side = drawn.choice((64, 96) if few else (256, 320))
        picture = root / f"{number}.png"
        Image.effect_noise((side, side), 80).convert("RGB").save(picture)
        asked, said = (words(10, 40), words(8, 30)) if few else (words(60, 200), words(30, 120))
        turns = [{"role": "user", "content": f"<image>\n{asked}?"}, {"role": "assistant", "content": said}]
        lines.append(json.dumps({"messages": turns, "images": [picture.name]}))
    for name in ("train.jsonl", "test.jsonl"):
        (root / name).write_text("\n".join(lines))


def overrides(root: Path, run: str, *, rank: int) -> list[str]:
    """The run, as both sides are told of it."""
    files = [f"data.{split}.vpt.options.path={split}.jsonl" for split in ("train", "test")]
    return [
        "+experiment=baseline", "model=qwen2_vl_2b", f"model.path={root}/base", "data=vpt", f"data.root={root}", *files,
        "data.workers=1", "data.image.min_pixels=3136", f"model.lora.rank={rank}", "model.lora.alpha=16", "optim=tiny",
        "optim.weight_decay=0", "optim.warmup_ratio=0", "optim.lr=1.0e-4", "training=tiny", "training.eval_every=0",
        f"training.steps={2 * STEPS}", f"training.batch_size={BATCH}", f"training.micro_batch_size={BATCH}",
        f"training.checkpoint_every={STEPS}", "training.log_every=1", "training.precision=fp32", "masking=none",
        "device=cpu", "tracking=none", "pictures=false", f"output_dir={root}", f"run_name={run}",
    ]  # fmt: skip


def measure_side(name: str, root: Path, *, rank: int) -> Side:
    """Train, kill, go on, kill."""
    program, log = SIDES[name]
    run = root / name
    shutil.rmtree(run, ignore_errors=True)
    typed = [*program.split(), *([str(run)] if name != "vpt" else []), *overrides(root, name, rank=rank)]
    ends, peak = _until(typed, run / log, STEPS + 1, root)
    loss = _losses(run / log)[0]
    lines = (run / log).read_text().splitlines(keepends=True)
    (run / log).write_text("".join(lines[:STEPS]))  # those up to the checkpoint
    resumed, _ = _until(typed, run / log, STEPS + 1, root)
    if json.loads((run / log).read_text().splitlines()[-1])["step"] != STEPS + 1:
        raise RuntimeError(f"{name} did not go on from step {STEPS}: {(root / 'output.txt').read_text()[-3000:]}")
    return Side(BATCH * (STEPS - 2) / (ends[STEPS - 1] - ends[1]), peak, ends[0], resumed[0], loss)


def _losses(log: Path) -> list[float]:
    lines = map(json.loads, log.read_text().splitlines()) if log.is_file() else ()
    return [line["train/loss"] for line in lines if "train/loss" in line]


def _until(command: list[str], log: Path, count: int, root: Path) -> tuple[list[float], int]:
    """Run a program until its log has `count` steps, then kill it; seconds until each new one came, and its peak."""
    before, started, ends = len(_losses(log)), time.perf_counter(), list[float]()

    def done() -> bool:
        ends.extend([time.perf_counter() - started] * (len(_losses(log)) - before - len(ends)))
        return before + len(ends) >= count

    _, peak = run_program(command, root / "output.txt", until=done)
    return ends, peak


def parse_arguments(arguments: Sequence[str] | None = None) -> argparse.Namespace:
    """What was typed, or `arguments`."""
    parser = argparse.ArgumentParser(description=str(__doc__).partition("\n")[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--lora", type=int, default=0, metavar="RANK", help="adapters, those of peft beside ours")
    parser.add_argument("--root", type=Path, default=ROOT / "outputs" / "hf_trainer")
    parser.add_argument("--reduced", action="store_true", help="a tiny base, to see that it runs")
    return parser.parse_args(arguments)


def main() -> None:
    """Measure, print, write."""
    asked = parse_arguments()
    shutil.rmtree(asked.root, ignore_errors=True)
    asked.root.mkdir(parents=True)
    model = ModelConfig(config=TINY_QWEN if asked.reduced else SMALL.qwen)
    write_folders(TrainConfig("none", model=model), asked.root)
    write_rows(asked.root)
    rounds = [{name: measure_side(name, asked.root, rank=asked.lora) for name in SIDES} for _ in range(asked.rounds)]
    if any(abs(sides["vpt"].loss - sides["transformers"].loss) > 1e-3 for sides in rounds):
        raise RuntimeError(f"the first losses differ: {rounds}")
    rows = []
    for field in ("samples_per_second", "peak", "first_step", "resume"):
        ours, theirs = ([getattr(sides[name], field) for sides in rounds] for name in SIDES)
        ratios = sorted(a / b for a, b in zip(ours, theirs, strict=True))
        medians = [statistics.median(values) for values in (ours, theirs, ratios)]
        rows.append([field, *medians, ratios[0], ratios[-1]])
    print(Table(["", "vpt", "transformers", "median ratio", "least", "greatest"], rows).as_text())
    asked.root.with_suffix(".json").write_text(
        json.dumps([{k: asdict(v) for k, v in r.items()} for r in rounds], indent=1)
    )


if __name__ == "__main__":
    main()
