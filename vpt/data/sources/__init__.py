"""Where records come from: any sequence of `Record` with a folder of images."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from vpt.data.baseline import without_perception, without_prompts
from vpt.data.records import Record


@dataclass(frozen=True)
class SourceContext:
    """What every source is told.

    Attributes:
        root: `data.root`, or None.
        encoder_tokens: re-encoder -> how it is spelt.
        actions: kind (`none`, `region` or a re-encoder) -> share; for sources that make up their own turns.
        prompted: whether questions say which perception to use (Free Choice leaves that out).
        perception: False removes every perception turn (the same-data baseline).
        plain_looks: puts a plain look of as many tokens in place of each perception that is removed.
        region_bins: cells of the region grid along a side.
        seed: of the run.
    """

    root: Path | None
    encoder_tokens: Mapping[str, str]
    actions: Mapping[str, float]
    action_prompt: bool
    perception: bool
    region_bins: int
    seed: int
    token_matched_images: bool = False

    def apply_run_options(self, record: Record) -> Record:
        """A record as this run wants it: without prompts, without perception."""
        if not self.perception:
            return without_perception(record, self.encoder_tokens, token_matched_images=self.token_matched_images)
        return record if self.action_prompt else without_prompts(record)


class Source(ABC):
    """Records by number.

    Attributes:
        root: the folder that their image paths start from.
        draw: for sources that make their images up: path -> image. `root` is then a name that no other images have.
    """

    root: Path
    render: Callable[[str], Image.Image] | None = None

    @abstractmethod
    def __len__(self) -> int:
        """How many records there are."""

    @abstractmethod
    def __getitem__(self, index: int) -> Record:
        """Record number `index`. Raises DataError that names it where it cannot be used."""
