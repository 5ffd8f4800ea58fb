"""Whether a training step of the demo waits for its data."""

import contextlib
import io
import json
import statistics
import tempfile
from pathlib import Path

from vpt.bench.measure import Measurement
from vpt.config.overrides import compose_train
from vpt.training.trainer import Trainer

WAITING = "perf/data_wait_fraction"
STEPS, WARM_UP = 30, 10  # workers start, and have to get ahead


def measure() -> list[Measurement]:
    """The share of the time of a demo step in which the loop waits for its batch."""
    config = compose_train([
        "+experiment=demo", "init_from=null", f"training.steps={STEPS}", "training.log_every=1",
        "training.eval_every=0", f"training.checkpoint_every={STEPS}",
    ])  # fmt: skip
    silent = io.StringIO()
    with tempfile.TemporaryDirectory() as folder:
        with contextlib.redirect_stdout(silent), contextlib.redirect_stderr(silent):
            Trainer(config, Path(folder)).fit()
        lines = (Path(folder) / "metrics.jsonl").read_text().splitlines()
    waited = [line[WAITING] for line in map(json.loads, lines) if WAITING in line]
    return [Measurement("loader_wait", statistics.mean(waited[WARM_UP:]), 0.05)]
