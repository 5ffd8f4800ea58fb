"""Metric loggers: `metrics.jsonl` always, W&B where the configuration asks for it."""

import json
import os
import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import wandb
from PIL.Image import Image

from vpt.config.schema import TrackingConfig
from vpt.errors import CheckpointError, ConfigError
from vpt.utils.files import atomic_write
from vpt.utils.table import Table
from vpt.utils.version import code_version


@dataclass(frozen=True)
class ReportMedia:
    """Attributes:
    page: `report.html` itself.
    tables, images: by name.
    """

    page: Path
    tables: Mapping[str, Table] = field(default_factory=dict)
    images: Mapping[str, Image] = field(default_factory=dict)


AXIS = "step"  # of the run, counted from 1; what every metric is drawn over
GROUPS = ("train", "eval", "perf", "data", "masking", "perception", "rl")
BEST = {"eval/loss": "min", "eval/token_accuracy": "max"}  # W&B's table of runs shows the best value


class MetricLogger:
    """Destination of a run's metrics, summary and report; ignores whatever a subclass has no place for."""

    id: str | None = None  # under which a resumed run continues

    def log(self, metrics: dict[str, Any], *, step: int) -> None: ...

    def log_summary(self, summary: dict[str, Any]) -> None: ...

    def log_media(self, media: ReportMedia) -> None: ...

    def close(self) -> None: ...


class NullLogger(MetricLogger):
    """A logger that does nothing, for `tracking=none`."""


class WandbLogger(MetricLogger):
    """A W&B run; a resumed training continues the same one."""

    def __init__(self, config: TrackingConfig, *, name: str, folder: Path, run_id: str | None, settings: dict) -> None:
        chosen: dict[str, Any] = {"mode": "online"} if config.mode == "online" else {}
        wandb.setup(wandb.Settings(silent=True, **chosen))
        theirs = wandb.setup().settings  # of W&B's environment variables and files
        mode: Any = theirs.mode if config.mode == "auto" else config.mode
        if mode not in ("offline", "dryrun", "disabled") and (reason := _why_offline(explicit=config.mode == "online")):
            print(f"W&B: goes on offline, {reason}", flush=True)
            mode = "offline"
        self.run = wandb.init(
            project=config.project or theirs.project or "vpt", entity=config.entity, name=theirs.run_name or name,
            dir=None if "WANDB_DIR" in os.environ else folder, id=run_id, resume="allow", mode=mode,
            config=settings | {"code": code_version()},
        )  # fmt: skip
        self.id = run_id if self.run.disabled else self.run.id
        self.run.define_metric(AXIS)
        for group in GROUPS:
            self.run.define_metric(f"{group}/*", step_metric=AXIS)
        for name, best in BEST.items():
            self.run.define_metric(name, step_metric=AXIS, summary=best)

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        # W&B's own step only ever grows: what a resumed run does again would be dropped.
        self.run.log({AXIS: step, **metrics})

    def log_summary(self, summary: dict[str, Any]) -> None:
        self.run.summary.update(summary)

    def log_media(self, media: ReportMedia) -> None:
        """The report as it is, and its tables and images one by one."""
        tables = {name: table.as_wandb() for name, table in media.tables.items()}
        images = {name: wandb.Image(image) for name, image in media.images.items()}
        page = wandb.Html(media.page.read_text(encoding="utf-8"), inject=False)
        self.run.log({f"report/{name}": shown for name, shown in {"page": page, **images, **tables}.items()})

    def close(self) -> None:
        """End the run; of one that was offline, say where it is and how it is sent."""
        self.run.finish()
        if self.run.offline and not self.run.disabled:
            here = Path(self.run.settings.sync_dir)
            parts = sorted(map(str, here.parent.glob(f"offline-run-*-{self.run.id}")))  # one of each process
            print(f"W&B: this run is offline in {here}; to send it: {shlex.join(['wandb', 'sync', *parts])}")


def _why_offline(*, explicit: bool) -> str | None:
    """Why a run cannot be sent; None where W&B has a key and its server takes it.

    Raises ConfigError where sending was asked for by `explicit` and there is no key.
    """
    try:
        if wandb.login(prompt=False, verify=True):
            return None
    except wandb.Error as error:
        return str(error)
    if explicit:
        raise ConfigError("tracking.mode=online needs a key; type: wandb login")
    return "having no key (type: wandb login)"


def build_tracker(
    config: TrackingConfig, *, name: str, folder: Path, run_id: str | None, settings: dict
) -> MetricLogger:
    """The logger of a service that the configuration asks for, beside the files."""
    if not config.wandb:
        return NullLogger()
    return WandbLogger(config, name=name, folder=folder, run_id=run_id, settings=settings)


class JSONLLogger(MetricLogger):
    """`metrics.jsonl`, one JSON object a line with its `step`; the summary goes to `summary.json` beside it."""

    def __init__(self, path: Path, *, resumed_at: int) -> None:
        """Lines after the step that the run resumes at are dropped: they are about to be written again."""
        self.path = path
        kept = [line for line in _lines(path) if json.loads(line)["step"] <= resumed_at]
        atomic_write(path, "".join(f"{line}\n" for line in kept))
        self._file = path.open("a", encoding="utf-8")

    def log(self, metrics: dict[str, Any], *, step: int) -> None:
        """Append a line; it is on its way to the disk when this returns. Raises CheckpointError where that is full."""
        try:
            self._file.write(json.dumps({"step": step, **metrics}) + "\n")
            self._file.flush()
        except OSError as error:
            raise CheckpointError(
                f"{self.path} cannot be written: {error}; make room and type the same command to go on from the last "
                "checkpoint"
            ) from None

    def log_summary(self, summary: dict[str, Any]) -> None:
        atomic_write(self.path.with_name("summary.json"), json.dumps(summary, indent=1))

    def close(self) -> None:
        self._file.close()


def _lines(path: Path) -> list[str]:
    """The whole lines of a file, if it exists; a killed run may have left half of one at the end."""
    if not path.exists():
        return []
    return [line for line in path.read_text(encoding="utf-8").split("\n")[:-1] if line]
