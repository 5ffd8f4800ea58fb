"""Answering a test split: predictions, and what they amount to. Both `train.py` at its end and `eval.py` call it."""

import json
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.build import Parts
from vpt.config import TrainConfig
from vpt.data.build import build_masking, build_sources
from vpt.data.images import ImageFolder
from vpt.data.loader import eval_batches
from vpt.data.records import Record
from vpt.evaluation.metrics import exact_match, mean_by
from vpt.evaluation.teacher_forced import score
from vpt.generate import Generator
from vpt.speaker import IGNORED, MENDED, Answer


@dataclass(frozen=True)
class Question:
    """One test record and the folder of its images."""

    record: Record
    folder: ImageFolder


def questions(config: TrainConfig, *, limit: int | None) -> list[Question]:
    """The test split, or its first `limit` questions."""
    sources, folders = build_sources(config.data.test, config, split="test")
    pairs = ((source, folder, i) for source, folder in zip(sources, folders, strict=True) for i in range(len(source)))
    chosen: list[Question] = []
    for source, folder, index in pairs:
        if limit is not None and len(chosen) >= limit:
            break
        chosen.append(Question(source[index], folder))
    return chosen


def evaluate(parts: Parts, config: TrainConfig, folder: Path, *, limit: int | None = None) -> dict[str, Any]:
    """Answer the test split and write `predictions.jsonl` and `summary.json` into `folder`.

    Returns:
        the summary: accuracy, by question type, by kind of perception; teacher-forced accuracy of each perception
        token; how often the model perceived; how many requests were mended or ignored (`vpt.asking`), how many answers
        cut off; seconds a question.
    """
    folder.mkdir(parents=True, exist_ok=True)
    asked = questions(config, limit=limit)
    started = time.perf_counter()
    with (folder / "predictions.jsonl").open("w", encoding="utf-8") as file:
        predictions = []
        for question, answer in answers(parts, config, asked):
            predictions.append(prediction(question, answer))
            file.write(json.dumps(predictions[-1]) + "\n")
    took = time.perf_counter() - started
    summary = summarise(predictions, seconds=took) | {"teacher_forced": _teacher_forced(parts, config, len(asked))}
    (folder / "summary.json").write_text(json.dumps(summary, indent=1))
    return summary


def answers(parts: Parts, config: TrainConfig, asked: list[Question]) -> Iterator[tuple[Question, Answer]]:
    """Generate, batch by batch, with a progress bar that shows the accuracy so far."""
    settings = config.generation
    generator = Generator.configured(parts.model, parts.encoder, parts.tokenizer, settings)
    right = done = 0
    with tqdm(total=len(asked), unit="question", dynamic_ncols=True, desc="answering") as bar:
        for start in range(0, len(asked), settings.batch_size):
            batch = asked[start : start + settings.batch_size]
            prompts = [parts.encoder.prompt(question.record, question.folder) for question in batch]
            folders = [question.folder for question in batch]
            results = generator.answer(prompts, folders, numbers=range(start, start + len(batch)))
            for question, answer in zip(batch, results, strict=True):
                right += exact_match(answer.text, question.record.answer)
                done += 1
                yield question, answer
            bar.update(len(batch))
            bar.set_postfix_str(f"accuracy {right / done:.4f}")


def prediction(question: Question, answer: Answer) -> dict[str, Any]:
    """One line of `predictions.jsonl`."""
    record = question.record
    return {
        "record": record.where,
        "question": record.question,
        "target": record.answer,
        "answer": answer.text,
        "right": exact_match(answer.text, record.answer),
        "type": record.question_type,
        "images": {source: [str(image) for image in images] for source, images in record.images.items()},
        "box": record.box,
        "complete": answer.complete,
        "trace": [asdict(step) for step in answer.trace],
    }


def summarise(predictions: list[dict[str, Any]], *, seconds: float) -> dict[str, Any]:
    """Accuracy in all, by question type, and by what the model did before it answered."""

    def kind(item: dict[str, Any]) -> str:
        return " + ".join(step["kind"] for step in item["trace"] if step["status"] != IGNORED) or "none"

    count = len(predictions)
    steps = [step for item in predictions for step in item["trace"]]
    statuses = Counter(step["status"] for step in steps)
    return {
        "questions": count,
        "accuracy": sum(item["right"] for item in predictions) / max(count, 1),
        "accuracy_by_type": mean_by((item["type"], item["right"]) for item in predictions),
        "accuracy_by_perception": mean_by((kind(item), item["right"]) for item in predictions),
        "perceptions": dict(Counter(kind(item) for item in predictions)),
        "requests_mended": statuses[MENDED],
        "requests_ignored": statuses[IGNORED],
        "cut_off": sum(not item["complete"] for item in predictions),
        "perceived_tokens_per_question": sum(step["visual_tokens"] for step in steps) / max(count, 1),
        "seconds_per_question": seconds / max(count, 1),
    }


def _teacher_forced(parts: Parts, config: TrainConfig, rows: int) -> dict[str, float]:
    sources, folders = build_sources(config.data.test, config, split="test")
    batches = (
        batch.to(parts.model.device)
        for source, folder in zip(sources, folders, strict=True)
        for batch in eval_batches(
            source, folder, parts.encoder, build_masking(config), rows=min(rows, config.training.eval_rows),
            batch_size=config.training.micro_batch_size, seed=config.seed,
        )
    )  # fmt: skip
    return score(parts.model, batches)
