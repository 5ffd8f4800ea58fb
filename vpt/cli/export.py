"""Write a trained model into a folder of its own.

    vpt export checkpoint=outputs/dino to=FOLDER                    for vpt.load
    vpt export checkpoint=outputs/dino to=FOLDER format=upstream    as the authors published theirs
    vpt export checkpoint=outputs/region to=FOLDER format=qwen      for transformers' own class
    vpt export checkpoint=outputs/lora to=FOLDER format=peft        its adapters, for peft
    vpt export checkpoint=outputs/dino to=FOLDER format=hub         with a model card made from the run
    vpt export checkpoint=outputs/dino to=FOLDER format=hub push=OWNER/NAME license=apache-2.0

`push` uploads the folder to a hub as a private model; `vpt.load("OWNER/NAME")` reads it back.
`checkpoint` may be a run, one of its checkpoints, an exported folder, or a checkpoint that the authors published. Where
it names frozen weights instead of holding them, and these were moved since, `model.path=NEW_PLACE` and
`encoder.NAME.path=NEW_PLACE` say where they are.
"""

import re
from collections.abc import Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any

from vpt.checkpoint.export import Export, export
from vpt.checkpoint.hub import push
from vpt.config.schema import TrainConfig
from vpt.errors import ConfigError, did_you_mean
from vpt.reporting.model_card import write_card

_MOVED = re.compile(r"model\.path|encoder\.\w+\.path")


def parse(arguments: Sequence[str]) -> Export:
    """`key=value` arguments. Raises ConfigError for unknown keys, and for those that are missing."""
    known = [item.name for item in fields(Export) if item.name != "paths"]
    typed = dict(argument.partition("=")[::2] for argument in arguments)
    paths = {key: value for key, value in typed.items() if _MOVED.fullmatch(key)}
    given: dict[str, Any] = {key: value for key, value in typed.items() if key not in paths}
    for key in given:
        if key not in known:
            raise ConfigError(
                f"{key} is not a key of vpt export{did_you_mean(key, [*known, 'model.path'])}; keys: {', '.join(known)}"
            )
    missing = [key for key in ("checkpoint", "to") if not given.get(key)]
    if missing:
        raise ConfigError(f"{missing[0]} is missing; type vpt export checkpoint=outputs/RUN_NAME to=FOLDER")
    return Export(**given, paths=paths)


def main(arguments: Sequence[str]) -> None:
    """`vpt export`."""
    wanted = parse(arguments)

    def card(folder: Path, config: TrainConfig) -> None:
        write_card(
            folder, config, checkpoint=wanted.checkpoint, license=wanted.license, repository=wanted.push or "OWNER/NAME"
        )

    folder = export(wanted, card=card)
    print(f"wrote {folder}")
    if wanted.push is not None:
        print(f"uploaded to {push(folder, wanted.push)}")
