"""Files of a run that a report shows."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from vpt.errors import CheckpointError
from vpt.evaluation.predictions import PREDICTIONS, Prediction
from vpt.reporting.curves import Curves, read_curves
from vpt.reporting.examples import ExampleAnswer, read_examples
from vpt.reporting.runs import read_answers, read_summary

REPORT = "report.html"


@dataclass(frozen=True)
class RunArtifacts:
    """One set of answers and the run that they are from. What is not there is empty.

    Attributes:
        run: the run's folder.
        answers: the folder of `predictions.jsonl`.
        page: where the report goes.
        curves: metrics over the steps of training.
        summary: `summary.json` of these answers, ablations included.
        predictions: the answers themselves.
        examples: those that are shown one by one.
    """

    run: Path
    answers: Path
    page: Path
    curves: Curves
    summary: dict[str, Any]
    predictions: list[Prediction]
    examples: list[ExampleAnswer]

    @classmethod
    def at(cls, folder: Path) -> "RunArtifacts":
        """Read the files of a run (its final answers) or of one of its evaluations.

        Raises:
            CheckpointError: where there is neither.
        """
        is_run = (folder / "metrics.jsonl").is_file()
        answers = folder / "predictions" if is_run else folder
        if not is_run and not (answers / PREDICTIONS).is_file():
            raise CheckpointError(
                f"{folder} holds neither metrics.jsonl nor {PREDICTIONS}; give a run (outputs/RUN_NAME) or one of its "
                "evaluations (outputs/RUN_NAME/eval/test)"
            )
        run = next((up for up in (folder, *folder.absolute().parents) if (up / "metrics.jsonl").is_file()), folder)
        return cls(
            run=run,
            answers=answers,
            page=folder / REPORT,
            curves=read_curves(run) if (run / "metrics.jsonl").is_file() else {},
            summary=read_summary(answers) | read_summary(folder),
            predictions=read_answers(answers),
            examples=read_examples(answers),
        )

    @property
    def name(self) -> str:
        """The run's name, and the evaluation's where it is one."""
        if self.page.parent == self.run:
            return self.run.name
        return f"{self.run.name}: {self.page.parent.name}"

    @property
    def settings(self) -> str:
        """The run's `config.yaml`."""
        file = self.run / "config.yaml"
        return file.read_text(encoding="utf-8") if file.is_file() else ""

    def siblings(self) -> list[Path]:
        """Reports of the same run besides this one."""
        pages = [self.run / REPORT, *sorted(self.run.glob(f"eval/*/{REPORT}"))]
        return [page for page in pages if page.is_file() and page.resolve() != self.page.resolve()]
