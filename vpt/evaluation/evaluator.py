"""Answering a test split: predictions, and what they amount to. Both `train.py` at its end and `eval.py` call it."""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from vpt.config.schema import TrainConfig
from vpt.data.build import build_masking, build_sources
from vpt.data.loader import eval_batches
from vpt.distributed.process_group import World
from vpt.evaluation.metrics.exact_match import exact_match
from vpt.evaluation.predictions import Prediction, open_log
from vpt.evaluation.questions import EvalQuestion, expected_actions, questions
from vpt.evaluation.summary import Metrics, metrics_of, summarise
from vpt.evaluation.teacher_forced import teacher_forced_metrics
from vpt.generation.generator import Generator
from vpt.generation.intervention import Intervention
from vpt.generation.row_state import Answer
from vpt.models.build import ModelBundle
from vpt.utils.files import atomic_write


def evaluate(
    parts: ModelBundle, config: TrainConfig, folder: Path, *, weights: str, limit: int | None = None,
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answer the test split and write `predictions.jsonl` and `summary.json` into `folder`.

    Args:
        parts, config: the model, and how it was trained and is to answer.
        folder: for results; answers that it holds of an interrupted evaluation are kept.
        weights: a digest of the checkpoint (`checkpoint.digest`).
        limit: the first n questions only.
        world: where several processes, all of which hold the whole model, share the work. Rank 0 writes.

    Returns:
        the summary: accuracy, by question type, by kind of perception; every metric with its interval; teacher-forced
        accuracy of each perception token; how the model perceived, how many requests were repaired or ignored
        (`vpt.perception.requests`), how many answers cut off; seconds a question.
    """
    metrics = metrics_of(config.data)
    asked = questions(config, limit=limit)
    world = world or World()
    predictions = answer_questions(parts, config, asked, folder, weights=weights, world=world)
    return write_summary(parts, config, folder, predictions, metrics, world=world)


def write_summary(
    parts: ModelBundle, config: TrainConfig, folder: Path, predictions: Sequence[Prediction], metrics: Metrics, *,
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `summary.json` and return what it holds."""
    world = world or World()
    summary = summarise(predictions, metrics)
    summary |= {"teacher_forced": _teacher_forced(parts, config, len(predictions), world)}
    if world.is_main:
        atomic_write(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def answer_questions(
    parts: ModelBundle, config: TrainConfig, asked: Sequence[EvalQuestion], folder: Path, *, weights: str,
    control: str = "", intervention: Intervention | None = None, world: World | None = None,
) -> list[Prediction]:  # fmt: skip
    """Answer questions and log the answers in `folder`; those that it holds already are not asked again.

    Args:
        parts, config, weights: as in `evaluate`.
        asked: the questions.
        folder: of the log.
        control: what to call the intervention, with its settings.
        intervention: what is changed about perception.
        world: processes that take a batch each in turn; rank 0 logs.
    """
    world = world or World()
    generator = Generator.from_config(
        parts.model, parts.processor, parts.tokenizer, config.generation, intervention=intervention
    )
    chosen = answer_settings(config, weights) | {"control": control}
    tokens, size = parts.processor.chat_template.encoder_tokens, config.generation.batch_size
    with open_log(folder, chosen, [question.record.where for question in asked], world) as log:
        waiting, name = asked[len(log.done) :], folder.name if control else "answering"
        with _bar(len(asked), done=len(asked) - len(waiting), name=name, quiet=not world.is_main) as bar:
            for first in range(0, len(waiting), size * world.size):
                start, began = first + size * world.rank, time.perf_counter()
                batch = waiting[start : start + size]
                answers = answer_batch(generator, batch) if batch else []
                seconds = (time.perf_counter() - began) / max(len(batch), 1)
                pairs = zip(batch, answers, strict=True)
                log.add([prediction(question, said, tokens, seconds=seconds) for question, said in pairs])
                bar.update(len(log.done) - bar.n)
                bar.set_postfix_str(f"accuracy {sum(item.correct for item in log.done) / len(log.done):.4f}")
        return log.done[: len(asked)]


def answer_settings(config: TrainConfig, weights: str) -> dict[str, Any]:
    """Settings that change an answer; earlier answers under other settings are not taken up."""
    data = asdict(config.data)
    for key in ("root", "train", "metrics", "limit", "workers", "image_cache_mb", "max_length", "overflow"):
        del data[key]
    data["test"] = {name: node | {"metrics": None} for name, node in data["test"].items()}
    generation = asdict(config.generation)
    del generation["batch_size"]
    return {"weights": weights, "seed": config.seed, "data": data, "generation": generation}


def answer_batch(generator: Generator, batch: Sequence[EvalQuestion]) -> list[Answer]:
    """Answer one batch of questions."""
    prompts = [generator.processor.encode_prompt(question.record, question.folder) for question in batch]
    folders = [question.folder for question in batch]
    return generator.generate(prompts, folders, numbers=[question.number for question in batch])


def _bar(total: int, *, done: int, name: str, quiet: bool) -> tqdm:
    return tqdm(total=total, initial=done, unit="question", dynamic_ncols=True, desc=name, disable=quiet)


def prediction(question: EvalQuestion, answer: Answer, encoder_tokens: dict[str, str], *, seconds: float) -> Prediction:
    """One line of `predictions.jsonl`."""
    record = question.record
    accepted = list(record.accepted) or [record.answer]
    return Prediction(
        record=record.where,
        source=question.source,
        question=record.question,
        target=record.answer,
        accepted=accepted,
        answer=answer.text,
        correct=exact_match(answer.text, accepted),
        type=record.question_type,
        images={source: [image.as_json() for image in images] for source, images in record.images.items()},
        box=record.box,
        expected_actions=expected_actions(record, encoder_tokens),
        complete=answer.complete,
        confidence=answer.confidence,
        trace=answer.trace,
        seconds=seconds,
    )


def _teacher_forced(parts: ModelBundle, config: TrainConfig, rows: int, world: World) -> dict[str, float]:
    sources, folders = build_sources(config.data.test, config, split="test")
    batches = (
        batch.to(parts.model.device)
        for source, folder in zip(sources, folders, strict=True)
        for batch in eval_batches(
            source, folder, parts.processor, build_masking(config), rows=min(rows, config.training.eval_rows),
            batch_size=config.training.micro_batch_size, seed=config.seed, rank=world.rank, ranks=world.size,
        )
        if batch.rows
    )  # fmt: skip
    return teacher_forced_metrics(parts.model, batches, world)
