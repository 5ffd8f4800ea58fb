"""Answers that are shown one by one: the best, the worst, and some drawn at random, with their similarity maps."""

import json
import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from vpt.config.schema import TrainConfig
from vpt.evaluation.evaluator import answer_batch
from vpt.evaluation.predictions import PREDICTIONS, Prediction, answered, read_log
from vpt.evaluation.questions import EvalQuestion, questions
from vpt.evaluation.summary import metrics_of, score
from vpt.generation.generator import Generator
from vpt.generation.similarity_map import SimilarityMap, similarity_maps
from vpt.models.build import ModelBundle
from vpt.perception.requests import REGION
from vpt.utils.files import atomic_write

EXAMPLES = "examples.json"
RANDOM, WORST, BEST = "drawn at random", "worst: the model was sure", "best: right, and the model was sure"
EACH = 6  # of a kind


@dataclass(frozen=True)
class ExampleAnswer:
    """Attributes:
    why: it is shown, one of the above.
    number: its place among the predictions.
    maps: for each step of its trace the similarity map of its control state, if one conditioned what was shown.
    """

    why: str
    number: int
    maps: list[SimilarityMap | None]


def select_examples(items: Sequence[Prediction], scores: Sequence[float]) -> list[tuple[str, int]]:
    """Why an answer is shown, and its number: first some at random, then the worst, then the best, none of them twice.

    The best and the worst are those with the highest and the lowest score; among equals, those that the model was
    surest of. What has a perfect score is never among the worst, what has none never among the best.
    """
    sure = sorted(range(len(items)), key=lambda n: -items[n].confidence)
    drawn = random.Random(0).sample(range(len(items)), min(EACH, len(items)))
    rest = [n for n in sure if n not in drawn]
    worst = sorted((n for n in rest if scores[n] < 1), key=lambda n: scores[n])[:EACH]
    best = sorted((n for n in rest if scores[n] > 0 and n not in worst), key=lambda n: -scores[n])[:EACH]
    return [(why, n) for why, chosen in ((RANDOM, drawn), (WORST, worst), (BEST, best)) for n in chosen]


def save_examples(bundle: ModelBundle, config: TrainConfig, folder: Path, *, limit: int | None) -> None:
    """Choose examples and write them beside the answers; those that re-encoded are answered again for their control
    states.

    Args:
        bundle, config, limit: what answered, how, and how many questions.
        folder: of the answers.
    """
    log = read_log(folder / PREDICTIONS)
    asked = [q for q, item in zip(questions(config, limit=limit), log, strict=False) if not item.skipped]
    items = answered(log)[: len(asked)]
    chosen = select_examples(items, score(items, metrics_of(config.data)).numerator.tolist())
    again = [n for _, n in chosen if any(step.kind != REGION for step in items[n].perceived)]
    maps = dict(zip(again, _maps(bundle, config, [asked[n] for n in again]), strict=True))
    examples = [ExampleAnswer(why, n, maps.get(n, [])) for why, n in chosen]
    atomic_write(folder / EXAMPLES, json.dumps([_as_json(example) for example in examples]))


def _maps(bundle: ModelBundle, config: TrainConfig, asked: Sequence[EvalQuestion]) -> list[list[SimilarityMap | None]]:
    if not asked:
        return []
    generator = Generator.from_config(bundle.model, bundle.processor, bundle.tokenizer, config.generation)
    found = []
    for question, said in zip(asked, answer_batch(generator, asked), strict=True):
        reference = question.record.image
        assert reference is not None, "only what has an image is re-encoded"
        image = question.folder.full_resolution(reference, where=question.record.where)
        found.append(similarity_maps(bundle, said, question.folder, image))
    return found


def _as_json(example: ExampleAnswer) -> dict[str, Any]:
    maps = [found and {"values": np.round(found.values, 5).tolist(), "extent": found.extent} for found in example.maps]
    return asdict(example) | {"maps": maps}


def read_examples(folder: Path) -> list[ExampleAnswer]:
    """Read what `save_examples` wrote; an empty list where there is nothing."""
    path = folder / EXAMPLES
    raw = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else []
    return [
        ExampleAnswer(
            item["why"], item["number"],
            [found and SimilarityMap(np.array(found["values"]), tuple(found["extent"])) for found in item["maps"]],
        )
        for item in raw
    ]  # fmt: skip
