"""Do ten steps of training have the same losses, to the last bit, as at another commit?

    python tests/helpers/same_loss.py REF        (make same-loss REF=COMMIT)

Every program of `RUNS` is started in the working tree and in a checkout of REF. Losses of REF are remembered in
`outputs/same_loss`, so a series of changes pays for them once.
"""

import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
KNOWN = ROOT / "outputs" / "same_loss"
STEPS = 10
PATIENCE = 30  # seconds
SHORT = [
    f"training.steps={STEPS}", "training.log_every=1", "training.eval_rows=8", "training.batch_size=8",
    "training.micro_batch_size=4", "data.limit=4", "tracking=none", "strategy=auto", "device=cpu",
]  # fmt: skip
RUNS = {
    "all": (1, ["+experiment=all", "model=tiny"]),
    "region": (1, ["+experiment=region", "model=tiny"]),
    "free choice": (1, ["+experiment=scenes/free_choice", "init_from=null"]),  # no earlier stage, which takes minutes
    "all, 2 processes": (2, ["+experiment=all", "model=tiny"]),
    "all, 2 processes, FSDP": (2, ["+experiment=all", "model=tiny", "strategy=fsdp"]),
}


def losses(tree: Path, processes: int, overrides: list[str]) -> list[str]:
    """The losses of ten steps of `train.py` in `tree`, as they are written in `metrics.jsonl`."""
    with tempfile.TemporaryDirectory() as folder:
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        short = [item for item in SHORT if not any(o.startswith(item.partition("=")[0] + "=") for o in overrides)]
        command = [sys.executable, *(launcher if processes > 1 else []), "train.py", *overrides, *short]
        environment = os.environ | {"PYTHONPATH": str(tree), "OMP_NUM_THREADS": "1", "TQDM_DISABLE": "1"}
        with (log := Path(folder, "log")).open("w") as output:
            run = subprocess.Popen(
                [*command, f"output_dir={folder}"], cwd=tree, env=environment, stdout=output, stderr=output,
                start_new_session=True,
            )  # fmt: skip
            wait_for(run, Path(folder))
        found = sorted(Path(folder).rglob("metrics.jsonl"))
        lines = [json.loads(line) for file in found for line in file.read_text().splitlines()]
        steps = [repr(line["train/loss"]) for line in lines if "train/loss" in line]
        if len(steps) != STEPS:
            sys.exit(f"{tree}: {' '.join(command)}\n{log.read_text()[-6000:]}")
    return steps


def wait_for(run: subprocess.Popen, folder: Path) -> None:
    """Wait until a run has ended, or hangs although its summary is written: commits up to d706686 do so at times."""
    while run.poll() is None:
        if any(time.time() - file.stat().st_mtime > PATIENCE for file in folder.rglob("summary.json")):
            os.killpg(run.pid, signal.SIGKILL)
        time.sleep(0.2)


def losses_at(ref: str) -> dict[str, list[str]]:
    """The losses of every run at a commit."""
    commit = subprocess.check_output(["git", "rev-parse", f"{ref}^{{commit}}"], cwd=ROOT, text=True).strip()
    file = KNOWN / f"{commit}.json"
    known = json.loads(file.read_text()) if file.exists() else {}
    missing = {name: run for name, run in RUNS.items() if name not in known}
    if missing:
        with tempfile.TemporaryDirectory() as folder:
            tree = Path(folder) / "tree"
            subprocess.check_call(["git", "worktree", "add", "--quiet", "--detach", tree, commit], cwd=ROOT)
            try:
                known |= {name: losses(tree, *run) for name, run in missing.items()}
            finally:
                subprocess.check_call(["git", "worktree", "remove", "--force", tree], cwd=ROOT)
        KNOWN.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(known, indent=1))
    return known


def main() -> int:
    if len(sys.argv) != 2:
        sys.exit("usage: python tests/helpers/same_loss.py REF; REF is a commit, HEAD say")
    before = losses_at(sys.argv[1])
    differing = 0
    for name, run in RUNS.items():
        now = losses(ROOT, *run)
        differing += now != before[name]
        print(f"{name:24} {'the same' if now == before[name] else f'{before[name]} became {now}'}", flush=True)
    return int(differing > 0)


if __name__ == "__main__":
    sys.exit(main())
