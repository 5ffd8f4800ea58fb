"""Pretrained parts as folders of weights, as a hub has them, with a card that says what was measured."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel

from vpt.models.build import ModelBundle
from vpt.utils.files import atomic_folder
from vpt.utils.version import code_version

_CARD = """# {name}: a small stand-in for published weights

A part of `model=small`, made on a CPU from training data that no test split shares: scenes of scikit-learn's
handwritten digits (the first four fifths), and easy-VQA's training split where it is a base model. It knows these
pictures and nothing else of the world.

- made by `{command}`, in {minutes:.0f} minutes of processor time, at {commit}
- {parameters:,} parameters, stored in bfloat16; the figures below are of the same weights in float32

| measured on the test split | |
|---|---|
{rows}

`whole/digit` and the like: of the patches of such an image that show something, the share that tell what it is by a
linear classifier trained along (a digit stands across four patches, each of which is asked by itself). `answers/...`:
of questions answered by generating, the share that is right to the letter; of `lessons` and `glance` all frames of a
scene are one answer.
"""


@dataclass(frozen=True)
class Card:
    """What a card says: `name` of the part, `command`, `scores` by name, and the `seconds` of processor time."""

    name: str
    command: str
    scores: Mapping[str, float]
    seconds: float

    def write(self, folder: Path, *, parameters: int) -> None:
        """Write README.md into a folder of weights."""
        rows = "\n".join(f"| {kind} | {score:.3f} |" for kind, score in self.scores.items())
        version = code_version()
        made = f"version {version['vpt']}"
        if "commit" in version:
            made = f"commit {version['commit']}{' with changes' * bool(version['dirty'])}"
        text = _CARD.format(
            name=self.name, command=self.command, minutes=self.seconds / 60, commit=made,
            parameters=parameters, rows=rows,
        )  # fmt: skip
        (folder / "README.md").write_text(text, encoding="utf-8")


def write_vision(target: Path, vision: PreTrainedModel, card: Card) -> Path:
    """A vision encoder's weights and card."""
    with atomic_folder(target) as draft:
        _save(vision, draft, card)
    return target


def write_base(target: Path, bundle: ModelBundle, card: Card) -> Path:
    """A base model's weights, tokenizer and card."""
    with atomic_folder(target) as draft:
        _save(bundle.model.qwen, draft, card)
        bundle.tokenizer.save_pretrained(draft)
    return target


def _save(model: PreTrainedModel, folder: Path, card: Card) -> None:
    model.to(torch.bfloat16).save_pretrained(folder)
    card.write(folder, parameters=sum(parameter.numel() for parameter in model.parameters()))
