"""Benchmarks of the field through lmms-eval, and one table of them.

    vpt benchmarks checkpoint=outputs/dino
    vpt benchmarks checkpoint=outputs/dino benchmarks=[vstar,pope] action=region limit=100
    vpt benchmarks url=http://127.0.0.1:8000/v1 name=dino

The table has each score with its interval, and the smallest difference between two models that the number of questions
can show; questions about one image, of which HR-Bench and POPE have several, count together.
vpt/integrations/benchmarks.yaml says what each benchmark needs; lmms-eval fetches its data.

    checkpoint               as of eval.py
    url, name                a server of the OpenAI chat format in place of a checkpoint, and what it calls the model;
                             action and the sizes of images and prompts are its own
    benchmarks               some of them; all by default
    action                   of a checkpoint: free; none; region or a re-encoder's name: what answers begin with
    limit                    the first questions of each task only
    batch_size               questions that are asked together
    device                   of a checkpoint
    tasks                    a folder of task files in place of lmms-eval's own
    out                      the scores of all questions; outputs/benchmarks.json by default
"""

import json
from collections.abc import Sequence
from pathlib import Path

from vpt.cli.ask import compose_settings
from vpt.errors import ConfigError, did_you_mean
from vpt.integrations.benchmarks import BenchmarksConfig, preset, run, table


def read_arguments(arguments: Sequence[str]) -> BenchmarksConfig:
    """Raises ConfigError for unknown keys and benchmarks, and where it is not said who answers."""
    config, texts = compose_settings(arguments, BenchmarksConfig)
    if texts:
        raise ConfigError(f"{texts[0]!r} is no KEY=VALUE; type vpt benchmarks checkpoint=RUN")
    known = [*preset()]
    for name in config.benchmarks:
        if name not in known:
            raise ConfigError(f"benchmarks={name} is not one of {', '.join(known)}{did_you_mean(name, known)}")
    if (config.checkpoint is None) == (config.url is None):
        raise ConfigError("give one of checkpoint=RUN and url=http://HOST:PORT/v1")
    _check_who(config)
    return config


def _check_who(config: BenchmarksConfig) -> None:
    """Raises ConfigError for a setting of a checkpoint where a server answers, or the other way round."""
    usual = BenchmarksConfig()
    if config.url is not None and config.action is not None:
        raise ConfigError(
            f"action={config.action} is of a checkpoint; start the server with it: vpt serve "
            f"generation.action={config.action}"
        )
    if config.url is not None and config.device != usual.device:
        raise ConfigError(f"device={config.device} is of a checkpoint; start the server with it: vpt serve device=...")
    if config.checkpoint is not None and config.name != usual.name:
        raise ConfigError(f"name={config.name} is of a server; leave it out, or give url= in place of checkpoint=")


def main(arguments: Sequence[str]) -> None:
    """`vpt benchmarks`."""
    config = read_arguments(arguments)
    scored = run(config)
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps({name: found.scores for name, found in scored.items()}))
    print(table(scored).as_text())
    print(f"wrote {out}")
