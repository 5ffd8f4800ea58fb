"""`eval.py` after its configuration has been checked."""

import json
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from vpt.checkpoint.format import run_folder
from vpt.checkpoint.load import load_any_config, load_pretrained, trained_steps, weights_digest
from vpt.config.evaluation import EvalConfig
from vpt.config.schema import TrainConfig
from vpt.config.validate import chosen_test_sets, generation_settings
from vpt.config.weight_folder import moved_paths
from vpt.data.build import check_sources
from vpt.errors import ConfigError
from vpt.evaluation.ablations.kinds import kinds_table, scores_by_kind
from vpt.evaluation.ablations.requests import gain_table
from vpt.evaluation.ablations.runner import (
    Comparison,
    ablation_table,
    as_json,
    check_ablations,
    check_same_questions,
    compare_answers,
    corrected,
    details_table,
    gain_of,
    run_ablations,
)
from vpt.evaluation.evaluator import answer_questions, write_summary
from vpt.evaluation.metrics.llm_judge import Judge
from vpt.evaluation.predictions import SETTINGS, Prediction, answered
from vpt.evaluation.questions import EvalQuestion, check_test_records, questions, repeated
from vpt.evaluation.summary import Metrics, headline, metrics_of, metrics_table
from vpt.models.build import ModelBundle
from vpt.reporting.charts import draw_ablations
from vpt.reporting.examples import save_examples
from vpt.reporting.figures import draw_sheet
from vpt.reporting.report import write_report
from vpt.reporting.wandb_media import report_media
from vpt.tracking import build_tracker
from vpt.utils.files import atomic_write
from vpt.utils.heap import keep_freed_heap
from vpt.utils.threads import set_threads


@dataclass
class Evaluation:
    """Evaluation of one checkpoint: its configuration, metrics, and the folder for results."""

    checkpoint: str
    config: TrainConfig
    folder: Path
    limit: int | None
    metrics: Metrics
    repeats: int = 1

    @classmethod
    def plan(cls, config: EvalConfig, path: str) -> "Evaluation":
        """The evaluation of `path` that is asked for. Loads no weights; raises UserError for what cannot run."""
        trained = load_any_config(path, moved_paths(config.model, config.encoder))
        own = replace(trained, generation=generation_settings(trained, config.generation))
        own.data.test = chosen_test_sets(trained, config.data.test)
        for key in ("root", "max_length", "on_error", "max_skipped_fraction"):
            if (value := getattr(config.data, key)) is not None:
                setattr(own.data, key, value)
        if config.data.metrics is not None:
            own.data.metrics = config.data.metrics
            own.data.test = {name: replace(node, metrics=None) for name, node in own.data.test.items()}
        if own.data.root is not None and not Path(own.data.root).is_dir():
            raise ConfigError(f"data.root={own.data.root} is not a folder; type data.root=FOLDER")
        check_sources(own, "test")
        metrics = metrics_of(own.data)
        if config.judge.url is not None:
            judge = Judge(config.judge)
            metrics = {name: [*scores, judge] for name, scores in metrics.items()}
        limit = config.data.limit if config.data.limit is not None else trained.data.limit
        if config.data.repeats > 1 and not own.generation.temperature:
            raise ConfigError("data.repeats draws several answers; greedy ones are the same: generation.temperature=1")
        return cls(path, own, run_folder(path) / "eval" / config.name, limit, metrics, config.data.repeats)

    def questions(self) -> list[EvalQuestion]:
        """The questions that are asked, each as often as `data.repeats` says."""
        return repeated(questions(self.config, limit=self.limit), self.repeats)

    @cached_property
    def weights(self) -> str:
        """The digest of the checkpoint."""
        return weights_digest(self.checkpoint)

    def beside(self, other: "Evaluation") -> "Evaluation":
        """This one, in a folder of its own where the other one, of the same run, has the same."""
        if self.folder.resolve() != other.folder.resolve():
            return self
        return replace(self, folder=self.folder.with_name(f"{self.folder.name}_baseline"))

    def load(self, config: EvalConfig) -> ModelBundle:
        """The model, ready to answer."""
        paths = moved_paths(config.model, config.encoder)
        bundle = load_pretrained(self.checkpoint, device=config.device, paths=paths)
        if bundle.model.device.type == "cpu":
            keep_freed_heap()
        bundle.processor.max_length = self.config.data.max_length
        return bundle

    def answer(self, bundle: ModelBundle) -> tuple[list[EvalQuestion], list[Prediction]]:
        """Write `predictions.jsonl`. Returns the questions and their answers, skipped ones among them."""
        chosen = self.questions()
        return chosen, answer_questions(bundle, self.config, chosen, self.folder, weights=self.weights)

    def run(self, config: EvalConfig) -> tuple[list[Prediction], dict[str, Any], dict[str, Comparison]]:
        """Answer, once more under every ablation, and write predictions and `summary.json`.

        Returns the answers without ablation, the summary, and the comparison with each ablation by name.
        """
        bundle = self.load(config)
        chosen, log = self.answer(bundle)
        summary = write_summary(bundle, self.config, self.folder, log, self.metrics)
        summary["step"] = trained_steps(self.checkpoint)
        chosen, plain = [q for q, item in zip(chosen, log, strict=True) if not item.skipped], answered(log)
        compared = run_ablations(
            bundle, self.config, chosen, plain, self.folder / "ablations", nodes=config.ablations, metrics=self.metrics,
            weights=self.weights,
        )  # fmt: skip
        if config.pictures:
            save_examples(bundle, self.config, self.folder, limit=self.limit)
        return plain, summary, compared


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Evaluate `config.checkpoint` on its own test split, beside ablations and baseline, and print its results."""
    check_ablations(config.ablations)
    evaluation = Evaluation.plan(config, config.checkpoint)
    if said := check_test_records(evaluation.config, limit=evaluation.limit):
        print(said)
    baseline = Evaluation.plan(config, config.baseline).beside(evaluation) if config.baseline is not None else None
    folder, about = evaluation.folder, f"baseline: {config.baseline}"
    if baseline is not None:
        names, others = ([question.record.where for question in one.questions()] for one in (evaluation, baseline))
        check_same_questions(about, names, {*others})
    print(f"  {set_threads(config.threads)}")
    plain, summary, compared = evaluation.run(config)
    if baseline is not None:
        _, other = baseline.answer(baseline.load(config))
        compared["baseline"] = compare_answers(about, plain, answered(other), evaluation.metrics)
    print(f"{headline(summary)}; see {folder}/summary.json")
    print(metrics_table(summary).as_text())
    if compared:
        compared = corrected(compared)
        summary["ablations"] = as_json(compared)
        print(ablation_table(compared).as_text())
    if gain := gain_of(compared):
        print(gain_table(gain).as_text())
    if details := details_table(compared):
        print(details.as_text())
    if compared and (kinds := scores_by_kind(plain, plain, evaluation.metrics)):
        print(kinds_table(kinds, {item.description: item.kinds for item in compared.values() if item.kinds}).as_text())
    atomic_write(folder / "summary.json", json.dumps(summary, indent=1))
    if config.pictures:
        if sheet := draw_sheet(folder, evaluation.config):
            print(f"  {sheet}")
        if any(item.difference for item in compared.values()):
            print(f"  {draw_ablations(compared, folder / 'ablations.png', title=str(config.checkpoint))}")
        print(f"  {write_report(folder, config=evaluation.config)}")
        _track(config, evaluation, summary)


def _track(config: EvalConfig, evaluation: Evaluation, summary: dict[str, Any]) -> None:
    """Send summary and report to W&B, where `tracking` asks for it."""
    name = f"{evaluation.config.run_name}/eval/{config.name}"
    settings = json.loads((evaluation.folder / SETTINGS).read_text())
    tracker = build_tracker(config.tracking, name=name, folder=evaluation.folder, run_id=None, settings=settings)
    tracker.log_summary(summary)
    tracker.log_media(report_media(evaluation.folder, config=evaluation.config))
    tracker.close()
