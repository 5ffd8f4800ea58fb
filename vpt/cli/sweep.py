"""Sweeps: a member that fails leaves a note and does not end the sweep; the end says what failed."""

import sys
import traceback
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig

from vpt.errors import UserError
from vpt.reporting.runs import NOTE


def in_sweep() -> bool:
    """This run is a member of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def note_failure(error: Exception, folder: Path) -> None:
    """Print why a member of a sweep failed, and write it into its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    lines = [f"error: {error}"] if isinstance(error, UserError) else traceback.format_exception(error)
    text = "".join(lines).rstrip()
    (folder / NOTE).write_text(f"{text}\n")
    print(text, file=sys.stderr, flush=True)


def forget_failure(folder: Path) -> None:
    """Remove the note of a member that has been run again and has ended well."""
    (folder / NOTE).unlink(missing_ok=True)


class SweepReport(Callback):
    """Hydra callback that counts the members of a sweep and prints at its end which failed."""

    def __init__(self) -> None:
        self.members: list[tuple[bool, list[str]]] = []

    def on_job_end(self, config: DictConfig, job_return: JobReturn, **kwargs: Any) -> None:
        """Note whether a member has ended well: it returns its accuracy."""
        if config.hydra.mode == RunMode.MULTIRUN:
            done = isinstance(job_return._return_value, float)  # the property would raise what the member raised
            self.members.append((done, list(job_return.overrides or ())))

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Print the members that failed with the commands that repeat them, and the command that compares all."""
        failed = [overrides for done, overrides in self.members if not done]
        print(f"{len(self.members) - len(failed)} of {len(self.members)} runs of the sweep have ended")
        for overrides in failed:
            alone = " ".join(_quoted(override) for override in overrides if not override.startswith("+sweep="))
            print(f"  failed: python train.py -m {alone}")
        print(f"see them side by side: vpt compare {config.output_dir}/{config.run_name}")


def _quoted(override: str) -> str:
    return f"'{override}'" if set(override) & set(' []{}$*?&|;()<>"') else override
