"""Write a trained model into a folder of its own.

    vpt export checkpoint=outputs/dino to=FOLDER                    for vpt.load
    vpt export checkpoint=outputs/dino to=FOLDER format=upstream    as the authors published theirs
    vpt export checkpoint=outputs/region to=FOLDER format=qwen      for transformers' own class

`checkpoint` may be a run, one of its checkpoints, an exported folder, or a checkpoint that the authors published.
"""

from collections.abc import Sequence
from dataclasses import fields

from vpt.checkpoint.export import Export, export
from vpt.errors import ConfigError, did_you_mean


def parse(arguments: Sequence[str]) -> Export:
    """`key=value` arguments. Raises ConfigError for unknown keys, and for those that are missing."""
    known = [item.name for item in fields(Export)]
    given = dict(argument.partition("=")[::2] for argument in arguments)
    for key in given:
        if key not in known:
            raise ConfigError(f"{key} is not a key of vpt export{did_you_mean(key, known)}; keys: {', '.join(known)}")
    missing = [key for key in ("checkpoint", "to") if not given.get(key)]
    if missing:
        raise ConfigError(f"{missing[0]} is missing; type vpt export checkpoint=outputs/RUN_NAME to=FOLDER")
    return Export(**given)


def main(arguments: Sequence[str]) -> None:
    """`vpt export`."""
    if {"-h", "--help"} & {*arguments}:
        print(__doc__)
        return
    print(f"wrote {export(parse(arguments))}")
