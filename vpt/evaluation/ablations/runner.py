"""Does the perception do the work? The same checkpoint with its perception changed, question by question."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from vpt.config.evaluation import AblationConfig
from vpt.config.schema import TrainConfig
from vpt.config.targets import ABLATION, check_arguments, locate
from vpt.errors import ConfigError, require
from vpt.evaluation.ablations.base import Ablation, AblationContext
from vpt.evaluation.ablations.kinds import scores_by_kind
from vpt.evaluation.ablations.regions import RegionOracle, RegionWhole
from vpt.evaluation.evaluator import answer_questions
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.questions import EvalQuestion
from vpt.evaluation.statistics import Estimate, difference, holm, paired_p, smallest_difference
from vpt.evaluation.summary import Metrics, estimates_table, image_clusters, score
from vpt.models.build import ModelBundle
from vpt.utils.table import Range, Table


@dataclass(frozen=True)
class Comparison:
    """Answers under an ablation, or another run's, beside the plain ones of the same questions.

    Attributes:
        description: the change.
        questions: how many could change; an answer that perceives nothing cannot.
        reference, ablated: the score of these questions, without and with the change; None where there are none.
        difference: ablated less reference, with its paired bootstrap interval; images are drawn, not questions.
        smallest: the smallest difference that these questions can show (`smallest_difference`).
        p: of the paired test (`paired_p`).
        p_holm: corrected for all comparisons of an evaluation (`corrected`).
        details: what else the ablation tells, over all questions.
        kinds: what the plain answers perceived ("region", "dino") -> the ablated score of those questions.
    """

    description: str
    questions: int
    reference: float | None = None
    ablated: float | None = None
    difference: Estimate | None = None
    smallest: float | None = None
    p: float | None = None
    p_holm: float | None = None
    details: dict[str, Estimate] = field(default_factory=dict)
    kinds: dict[str, Estimate] = field(default_factory=dict)

    @classmethod
    def of(
        cls, about: str, plain: Sequence[Prediction], changed: Sequence[Prediction], metrics: Metrics
    ) -> "Comparison":  # fmt: skip
        """Compare answers to the same questions, in the same order."""
        before, after, images = score(plain, metrics), score(changed, metrics), image_clusters(plain)
        if not before.questions or not after.questions:
            return cls(about, 0)
        found = difference(before, after, images)
        smallest, p = smallest_difference(before, after, images), paired_p(before, after, images)
        kinds = scores_by_kind(plain, changed, metrics)
        return cls(about, before.questions, before.value, after.value, found, smallest, p, kinds=kinds)


def check_ablations(nodes: Mapping[str, AblationConfig]) -> None:
    """Find what is wrong with them before a model is loaded. Raises ConfigError."""
    for name, node in nodes.items():
        key = f"ablations.{name}"
        check_arguments(key, node, ABLATION, given=("context",))
    if nodes:
        require("scipy.stats", "metrics", "comparing with ablations")


def run_ablations(
    bundle: ModelBundle, config: TrainConfig, asked: Sequence[EvalQuestion], plain: Sequence[Prediction],
    folder: Path, *, nodes: Mapping[str, AblationConfig], metrics: Metrics, weights: str,
) -> dict[str, Comparison]:  # fmt: skip
    """Answer under each ablation the questions that it may change; answers go to `folder`/NAME.

    Args:
        bundle, config, weights: as for `evaluate`.
        asked, plain: questions and their answers without ablation.
        folder: for predictions; an interrupted ablation goes on.
        nodes: the ablations.
        metrics: of every data set; the first gives the score.
    """
    context = AblationContext(bundle, config, asked, plain)
    compared, answers = {}, {}
    for name, node in nodes.items():
        ablation: Ablation = locate(node.target, name, ABLATION)(context, **node.options)
        places = [place for place, item in enumerate(plain) if ablation.applies_to(item)]
        if not places:
            compared[name] = Comparison(ablation.description, 0)
            continue
        what = json.dumps(asdict(node) | {"questions": len(asked)})
        chosen, concerned = [asked[place] for place in places], [plain[place] for place in places]
        changed = answer_questions(
            bundle, config, chosen, folder / name, weights=weights, ablation=what, intervention=ablation
        )
        answers[type(ablation)] = changed
        found = Comparison.of(ablation.description, concerned, changed, metrics)
        everywhere = dict(enumerate(plain)) | dict(zip(places, changed, strict=True))
        compared[name] = replace(found, details=ablation.details(plain, [*everywhere.values()], metrics))
    return compared | _crop_gap(answers, metrics)


def _crop_gap(answers: Mapping[type[Ablation], Sequence[Prediction]], metrics: Metrics) -> dict[str, Comparison]:
    """What the true crop brings over the whole image, where both were shown."""
    if not {RegionWhole, RegionOracle} <= answers.keys():
        return {}
    true, about = answers[RegionOracle], "true box in place of the whole image"
    boxed = {item.record for item in true}
    return {"crop_gap": compare_answers(about, [i for i in answers[RegionWhole] if i.record in boxed], true, metrics)}


def check_same_questions(about: str, records: Sequence[str], other: Collection[str]) -> None:
    """Raises ConfigError where another run lacks some of the records that are asked about."""
    missing = [record for record in records if record not in other]
    if missing:
        raise ConfigError(
            f"{about} does not answer {len(missing)} of the {len(records)} questions, {missing[0]} for one; evaluate "
            "both on the same test split, with the same data.limit"
        )


def compare_answers(
    about: str, plain: Sequence[Prediction], other: Sequence[Prediction], metrics: Metrics
) -> Comparison:
    """Another run's answers to the same questions.

    Raises:
        ConfigError: where it has not answered all of them.
    """
    found = {item.record: item for item in other}
    check_same_questions(about, [item.record for item in plain], found)
    paired = [found[item.record] for item in plain]
    return Comparison.of(about, plain, paired, metrics)


def corrected(compared: Mapping[str, Comparison]) -> dict[str, Comparison]:
    """The comparisons of one evaluation with `p_holm`."""
    found = holm([item.p for item in compared.values()])
    return {name: replace(item, p_holm=p) for (name, item), p in zip(compared.items(), found, strict=True)}


def gain_of(compared: Mapping[str, Comparison]) -> Mapping[str, Estimate]:
    """What perception gains (`requests.perception_gain`); empty where that was not asked."""
    return next((item.details for item in compared.values() if "gain" in item.details), {})


def details_table(compared: Mapping[str, Comparison]) -> Table | None:
    """What ablations tell besides accuracy and the split of the gain; None where that is nothing."""
    named = [
        ([f"{name.replace('_', ' ')} ({ablation})"], vars(e))
        for ablation, item in compared.items()
        for name, e in item.details.items()
        if "gain" not in item.details
    ]
    return estimates_table(["also measured"], named) if named else None


def ablation_table(compared: Mapping[str, Comparison]) -> Table:
    """A row for each comparison."""
    columns = [
        "what is changed", "questions", "as it is", "changed", "difference", "95% interval", "smallest to be seen", "p",
        "p (Holm)",
    ]  # fmt: skip
    rows = [
        (c.description, c.questions, c.reference, c.ablated, d.value, Range(d.low, d.high), c.smallest, c.p, c.p_holm)
        if (d := c.difference)
        else (c.description, 0, None, None, None, "no answer that it could change", None, None, None)
        for c in compared.values()
    ]  # fmt: skip
    form = dict.fromkeys(("as it is", "changed", "smallest to be seen"), ".4f") | dict.fromkeys(
        ("difference", "95% interval"), "+.4f"
    ) | dict.fromkeys(("p", "p (Holm)"), ".2g")  # fmt: skip
    return Table(columns, rows, form)


def as_json(compared: Mapping[str, Comparison]) -> dict[str, Any]:
    """Comparisons for `summary.json`."""
    return {name: asdict(item) for name, item in compared.items()}


def from_json(ablations: Mapping[str, dict[str, Any]]) -> dict[str, Comparison]:
    """Comparisons out of `summary.json`."""
    return {
        name: Comparison(**raw | {
            "difference": raw["difference"] and Estimate(**raw["difference"]),
            **{part: {key: Estimate(**one) for key, one in raw.get(part, {}).items()} for part in ("details", "kinds")},
        })
        for name, raw in ablations.items()
    }  # fmt: skip
