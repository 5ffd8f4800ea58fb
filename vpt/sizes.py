"""The sizes of a model's parts: what is needed to build it again without the folders it was made from."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.errors import CheckpointError
from vpt.model import VPTModel

QWEN = "qwen"  # the file of the language model's configuration; encoders' files carry their names


@dataclass(frozen=True)
class Sizes:
    """transformers' configurations, as dictionaries, of Qwen (`qwen`) and of each re-encoder that has its own."""

    qwen: dict[str, Any]
    encoders: dict[str, dict[str, Any]]

    @classmethod
    def of(cls, model: VPTModel) -> "Sizes":
        """Those of a model."""
        visions = {name: model.encoder(name).vision for name in model.encoders}
        encoders = {name: vision.config.to_diff_dict() for name, vision in visions.items() if vision is not None}
        return cls(model.qwen.config.to_dict(), encoders)

    def save(self, folder: Path) -> None:
        """One JSON file for each part."""
        folder.mkdir(parents=True, exist_ok=True)
        for name, config in {QWEN: self.qwen, **self.encoders}.items():
            (folder / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True))

    @classmethod
    def load(cls, folder: Path) -> "Sizes":
        """What `save` wrote. Raises CheckpointError where that is missing or broken."""
        try:
            found = {path.stem: json.loads(path.read_text()) for path in folder.glob("*.json")}
            return cls(found.pop(QWEN), found)
        except (OSError, KeyError, json.JSONDecodeError) as error:
            raise CheckpointError(f"{folder} does not hold the sizes of a model: {error!r}") from None
