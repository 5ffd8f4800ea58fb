"""Ablations: what is changed about perception to see whether it does the work.

Each leaves the question, the image and everything up to the first action as they are, so
answers that perceive nothing cannot change. What is drawn, is drawn from the seed and the record's name: no answer
depends on which others are in its batch.
"""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from PIL import Image

from vpt.config.schema import TrainConfig
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.questions import EvalQuestion
from vpt.evaluation.statistics import Estimate
from vpt.evaluation.summary import Metrics
from vpt.generation.intervention import Intervention
from vpt.models.build import ModelBundle


@dataclass
class AblationContext:
    """Inputs of an ablation: the model, all questions, and their answers without it, in the same order."""

    bundle: ModelBundle
    config: TrainConfig
    asked: Sequence[EvalQuestion]
    plain: Sequence[Prediction]


class Ablation(Intervention):
    """An intervention that says what it does (`description`) and which questions it may change."""

    description: ClassVar[str]

    def __init__(self, context: AblationContext, *, seed: int = 0) -> None:
        self.context, self.seed = context, seed
        self.question_of = {question.record.where: question for question in context.asked}

    def applies_to(self, plain: Prediction) -> bool:
        """Whether a question whose answer without it is `plain` may be answered otherwise."""
        return bool(plain.actions)

    def details(
        self, plain: Sequence[Prediction], changed: Sequence[Prediction], metrics: Metrics
    ) -> dict[str, Estimate]:
        """What else is told of all questions' answers, without and with this change; where it does not apply, they are
        the same.
        """
        return {}

    def rng(self, *salt: object) -> random.Random:
        """Random numbers of this ablation for whatever `salt` names."""
        return random.Random("/".join(map(str, (self.seed, *salt))))


def distinct_images(asked: Sequence[EvalQuestion]) -> dict[tuple[str, str], EvalQuestion]:
    """A question for each image, by the image's folder and name, in order."""
    found: dict[tuple[str, str], EvalQuestion] = {}
    for question in asked:
        if question.record.image:
            found.setdefault(image_key(question), question)
    return found


def full_image(question: EvalQuestion) -> Image.Image:
    """The image that actions encode or crop, at full resolution."""
    reference = question.record.image
    assert reference is not None, "distinct_images takes questions that have one"
    return question.folder.full_resolution(reference, where=question.record.where)


def image_key(question: EvalQuestion) -> tuple[str, str]:
    """A key of a question's image: equal keys are equal images."""
    return str(question.folder.root), str(question.record.image)
