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
from vpt.data.processor import Processor, Sample
from vpt.data.skipping import check_skipped
from vpt.distributed.process_group import World
from vpt.errors import DataError
from vpt.evaluation.metrics.exact_match import exact_match
from vpt.evaluation.prediction_log import open_log, that_matters
from vpt.evaluation.predictions import Prediction, answered
from vpt.evaluation.questions import EvalQuestion, expected_actions, questions
from vpt.evaluation.summary import Metrics, metrics_of, summarise
from vpt.evaluation.teacher_forced import teacher_forced_metrics
from vpt.generation.generator import Generator
from vpt.generation.intervention import Intervention
from vpt.generation.row_state import Answer
from vpt.models.build import ModelBundle
from vpt.utils.files import atomic_write


def evaluate(
    bundle: ModelBundle, config: TrainConfig, folder: Path, *, weights: str, limit: int | None = None,
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Answer the test split and write `predictions.jsonl` and `summary.json` into `folder`.

    Args:
        bundle, config: the model, and how it was trained and is to answer.
        folder: for results; answers that it holds of an interrupted evaluation are kept.
        weights: a digest of the checkpoint (`vpt.checkpoint.load.weights_digest`).
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
    predictions = answer_questions(bundle, config, asked, folder, weights=weights, world=world)
    return write_summary(bundle, config, folder, predictions, metrics, world=world)


def write_summary(
    bundle: ModelBundle, config: TrainConfig, folder: Path, predictions: Sequence[Prediction], metrics: Metrics, *,
    world: World | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Write `summary.json` and return what it holds."""
    world = world or World()
    summary = summarise(predictions, metrics)
    summary |= {"teacher_forced": _teacher_forced(bundle, config, len(predictions), world)}
    if world.is_main:
        atomic_write(folder / "summary.json", json.dumps(summary, indent=1))
    return summary


def answer_questions(
    bundle: ModelBundle, config: TrainConfig, asked: Sequence[EvalQuestion], folder: Path, *, weights: str,
    ablation: str = "", intervention: Intervention | None = None, world: World | None = None,
) -> list[Prediction]:  # fmt: skip
    """Answer questions and log the answers in `folder`; those that it holds already are not asked again.

    Args:
        bundle, config, weights: as in `evaluate`.
        asked: the questions.
        folder: of the log.
        ablation: what to call the intervention, with its settings.
        intervention: what is changed about perception.
        world: processes that take a batch each in turn; rank 0 logs.
    """
    world = world or World()
    generator = Generator.from_config(
        bundle.model, bundle.processor, bundle.tokenizer, config.generation, intervention=intervention
    )
    chosen = answer_settings(config, weights) | {"ablation": ablation}
    tokens, size = bundle.processor.chat_template.encoder_tokens, config.generation.batch_size
    with open_log(folder, chosen, [question.record.where for question in asked], world) as log:
        waiting, name = asked[len(log.done) :], folder.name if ablation else "answering"
        with _bar(len(asked), done=len(asked) - len(waiting), name=name, quiet=not world.is_main) as bar:
            for first in range(0, len(waiting), size * world.size):
                start, began = first + size * world.rank, time.perf_counter()
                batch = waiting[start : start + size]
                answers = answer_or_skip(generator, batch, config.data.on_error)
                seconds = (time.perf_counter() - began) / max(len(batch), 1)
                pairs = zip(batch, answers, strict=True)
                log.add([prediction(question, said, tokens, seconds=seconds) for question, said in pairs])
                bar.update(len(log.done) - bar.n)
                done = answered(log.done)
                bar.set_postfix_str(f"accuracy {sum(item.correct for item in done) / max(len(done), 1):.4f}")
                reasons, whole = [item.skipped for item in log.done if item.skipped], len(log.done) >= len(asked)
                check_skipped(
                    reasons, len(log.done), config.data.max_skipped_fraction, what="test questions", complete=whole
                )
        return log.done[: len(asked)]


def answer_settings(config: TrainConfig, weights: str) -> dict[str, Any]:
    """Settings that change an answer; earlier answers under other settings are not taken up. And where images are."""
    data = that_matters(asdict(config.data)) | {"root": config.data.root}
    data["test"] = {name: node | {"metrics": None} for name, node in data["test"].items()}
    generation = asdict(config.generation)
    del generation["batch_size"]
    return {"weights": weights, "seed": config.seed, "data": data, "generation": generation}


def answer_batch(generator: Generator, batch: Sequence[EvalQuestion]) -> list[Answer]:
    """Answer one batch of questions. Raises DataError where one cannot be asked."""
    return [said for said in answer_or_skip(generator, batch, "raise") if not isinstance(said, str)]


def answer_or_skip(generator: Generator, batch: Sequence[EvalQuestion], on_error: str) -> list[Answer | str]:
    """Answer one batch of questions; with `skip`, the reason stands in place of an answer where one cannot be asked."""
    prompts = [_prompt(generator.processor, question, on_error) for question in batch]
    pairs = [(question, prompt) for question, prompt in zip(batch, prompts, strict=True) if not isinstance(prompt, str)]
    folders, numbers = [question.folder for question, _ in pairs], [question.number for question, _ in pairs]
    answers = iter(generator.generate([prompt for _, prompt in pairs], folders, numbers=numbers) if pairs else [])
    return [prompt if isinstance(prompt, str) else next(answers) for prompt in prompts]


def _prompt(processor: Processor, question: EvalQuestion, on_error: str) -> Sample | str:
    try:
        return question.error or processor.encode_prompt(question.record, question.folder)
    except DataError as error:
        if on_error == "raise":
            raise
        return str(error)


def _bar(total: int, *, done: int, name: str, quiet: bool) -> tqdm:
    return tqdm(total=total, initial=done, unit="question", dynamic_ncols=True, desc=name, disable=quiet)


def prediction(
    question: EvalQuestion, answer: Answer | str, encoder_tokens: dict[str, str], *, seconds: float
) -> Prediction:  # fmt: skip
    """One line of `predictions.jsonl`; text in place of an answer says why there is none."""
    record = question.record
    if isinstance(answer, str):
        return Prediction(
            record.where, record.question, record.answer, "", False, source=question.source, skipped=answer
        )
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


def _teacher_forced(bundle: ModelBundle, config: TrainConfig, rows: int, world: World) -> dict[str, float]:
    sources, folders = build_sources(config.data.test, config, split="test")
    rows, size = min(rows, config.training.eval_rows), config.training.micro_batch_size
    batches = (
        batch.to(bundle.model.device)
        for source, folder in zip(sources, folders, strict=True)
        for batch in eval_batches(
            source, folder, bundle.processor, build_masking(config), rows=rows, batch_size=size, seed=config.seed,
            on_error=config.data.on_error, rank=world.rank, ranks=world.size,  # type: ignore[arg-type]
        )
    )  # fmt: skip
    total = sum(-(-min(rows, len(source)) // (size * world.size)) for source in sources)
    bar = tqdm(batches, total=total, unit="batch", dynamic_ncols=True, desc="scoring", disable=not world.is_main)
    return teacher_forced_metrics(bundle.model, (batch for batch in bar if batch.rows), world)
