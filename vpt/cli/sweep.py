"""Sweeps: a member's folder; a member that fails leaves a note and does not end the sweep; the end says what failed."""

import re
import sys
import traceback
from hashlib import blake2b
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import JobReturn
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf

from vpt.errors import UserError
from vpt.reporting.runs import NOTE
from vpt.utils.files import atomic_write

OVERRIDES = "overrides.txt"
LONGEST = 80  # characters of a member's name


def member_name(overrides: str) -> str:
    """The name of a member's folder: `seed=1,optim.lr=1e-4` is `seed-1_optim.lr-1e-4`.

    It has letters, digits, and `._-`, so that it needs no quotes anywhere. What has other characters, or is too long,
    ends in a digest of the whole.
    """
    plain = overrides.replace("=", "-").replace(",", "_")
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", plain).strip("._-")
    if name == plain and len(name) <= LONGEST:
        return name
    digest = blake2b(overrides.encode(), digest_size=4).hexdigest()
    return f"{name[: LONGEST - len(digest) - 1].rstrip('._-')}-{digest}"


OmegaConf.register_new_resolver("member_name", member_name, replace=True)  # for conf/train.yaml


def note_overrides(folder: Path) -> None:
    """Write what a member of a sweep overrides into its folder, one a line."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic_write(folder / OVERRIDES, "".join(f"{line}\n" for line in HydraConfig.get().overrides.task))


def in_sweep() -> bool:
    """This run is a member of a sweep."""
    return HydraConfig.get().mode == RunMode.MULTIRUN


def note_failure(error: Exception, folder: Path) -> None:
    """Print why a member of a sweep failed, and write it into its folder."""
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
