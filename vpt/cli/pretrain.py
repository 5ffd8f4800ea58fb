"""Make the small parts anew that `model=small` starts from.

    vpt pretrain base                        a Qwen3-VL that reads what its own tower sees
    vpt pretrain dino                        a DINOv2 whose patches tell digits and the colours of frames
    vpt pretrain sam                         a SAM whose positions tell digits, colours, and gaps in outlines
    vpt pretrain siglip                      a SigLIP, as DINOv2
    vpt pretrain dino training.steps=2400 run_name=longer seed=1
    vpt pretrain dino to=vpt/assets/dino     where the weights go; OUTPUT_DIR/RUN_NAME/weights by default

Recipes are the files of conf/pretrain; further arguments are overrides as of train.py. Type the same command again to
go on. The weights are written in bfloat16, with a card that says what was measured on the test split.
"""

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from vpt.checkpoint.load import build_model, load_pretrained
from vpt.cli.train import train
from vpt.config.overrides import CONF, check_overrides, compose_as, compose_train
from vpt.errors import ConfigError, did_you_mean
from vpt.models.build import ModelBundle
from vpt.pretraining.base import begin_alike
from vpt.pretraining.patches import TOWER
from vpt.pretraining.settings import PretrainConfig
from vpt.pretraining.trainer import pretrain_patches
from vpt.pretraining.weights import Card, write_base, write_vision

OWN_KEYS = ("patches.", "language=")  # which train.py does not have
RECIPES = sorted(file.stem for file in (CONF / "pretrain").glob("*.yaml"))


def compose_pretrain(name: str, overrides: Sequence[str]) -> PretrainConfig:
    """The configuration of `vpt pretrain NAME OVERRIDES`. Raises ConfigError for what does not exist."""
    if name not in RECIPES:
        raise ConfigError(
            f"{name} is no recipe of vpt pretrain; it makes {', '.join(RECIPES)}{did_you_mean(name, RECIPES)}"
        )
    check_overrides([*overrides], PretrainConfig)
    ours = [f"++{text}" if text.startswith(OWN_KEYS) else text for text in overrides]
    config = compose_as(PretrainConfig, [f"+pretrain={name}", *ours])
    if config.patches.part not in (TOWER, *config.encoder):
        raise ConfigError(
            f"patches.part={config.patches.part} is not {TOWER}{''.join(f' or {n}' for n in config.encoder)}"
        )
    return config


def parse(arguments: Sequence[str]) -> tuple[PretrainConfig, Path, str]:
    """The configuration, where the weights go, and the command as a card tells it."""
    name, *given = arguments
    overrides = [text for text in given if not text.startswith("to=")]
    config = compose_pretrain(name, overrides)
    targets = [Path(text.removeprefix("to=")) for text in given if text.startswith("to=")]
    target = targets[-1] if targets else Path(config.output_dir) / config.run_name / "weights"
    no_matter = ("output_dir=", "run_name=", "threads=")  # they change no result
    said = [text for text in overrides if not text.startswith(no_matter)]
    return config, target, " ".join(["vpt pretrain", name, *said])


def main(arguments: Sequence[str]) -> None:
    """`vpt pretrain`."""
    config, target, command = parse(arguments)
    if target.exists():
        raise ConfigError(f"{target} exists already; give another folder in to=FOLDER, or remove it")
    print(f"wrote {pretrain(config, Path(config.output_dir) / config.run_name, target, command=command)}")


def pretrain(config: PretrainConfig, folder: Path, target: Path, *, command: str) -> Path:
    """Train one part, or go on, and write its weights to `target`."""
    bundle, scores = pretrain_patches(config, folder, _begin)
    part = config.patches.part
    if part != TOWER:
        return write_vision(target, bundle.model.encoder(part).vision, _card(command, scores))
    tower = folder / "tower"
    if not tower.exists():
        write_base(tower, bundle, _card(command, scores))
    lessons = compose_train([
        *config.language, "model=small", f"model.path={tower.resolve()}", f"output_dir={folder}", "run_name=language",
        f"seed={config.seed}", f"threads={config.threads or 'null'}",
    ])  # fmt: skip
    train(lessons, folder / "language")
    summary = json.loads((folder / "language" / "summary.json").read_text(encoding="utf-8"))
    scores |= {f"answers/{kind}": share for kind, share in summary["accuracy_by_type"].items()}
    return write_base(target, load_pretrained(folder / "language", device="cpu", exact=True), _card(command, scores))


def _card(command: str, scores: Mapping[str, float]) -> Card:
    """The card of `vpt pretrain NAME ...`, with the time of this process and its data workers so far."""
    return Card(command.split()[2], command, scores, sum(os.times()[:4]))


def _begin(config: PretrainConfig) -> ModelBundle:
    """The model that a part belongs to, as it is before anything has been learned."""
    bundle = build_model(config)
    if config.patches.part == TOWER:
        begin_alike(bundle)
    return bundle
