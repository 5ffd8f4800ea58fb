"""A model card from what a run left: data, recipe, numbers, ablations, pictures, and what they do not show."""

import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined

from vpt.checkpoint.format import run_folder
from vpt.checkpoint.tensors import LazyStateDict
from vpt.config.schema import TrainConfig
from vpt.config.validate import kinds_of
from vpt.evaluation.ablations.runner import Comparison, ablation_table, from_json
from vpt.evaluation.summary import metrics_table
from vpt.reporting.runs import run_summaries
from vpt.utils.version import __version__

CARD = "README.md"
PICTURES = ("samples.png", "curves.png")
_TEMPLATES = Environment(
    loader=PackageLoader("vpt.reporting"), undefined=StrictUndefined, trim_blocks=True, keep_trailing_newline=True
)


def write_card(
    folder: Path, config: TrainConfig, *, checkpoint: str | Path, license: str, repository: str = "OWNER/NAME"
) -> None:
    """Write the card of a model, and the pictures in it, into its exported `folder`.

    Args:
        config: of the model.
        checkpoint: what was exported; results are those of the run that it belongs to, if any.
        license: as the hub spells it.
        repository: where it is to be read from.
    """
    run = run_folder(checkpoint)
    summaries = dict(_summaries(run))
    ablations = {
        name: from_json(summary["ablations"]) for name, summary in summaries.items() if summary.get("ablations")
    }
    pictures = [name for name in PICTURES if (run / name).is_file()]
    for name in pictures:
        (folder / "pictures").mkdir(exist_ok=True)
        shutil.copyfile(run / name, folder / "pictures" / name)
    shapes = LazyStateDict(folder).shapes
    text = _TEMPLATES.get_template("model_card.md").render(
        repository=repository, name=config.run_name, run=config.run_name, license=license, version=__version__,
        family=config.model.family,
        base=config.model.path, kinds=", ".join(kinds_of(config)[1:]) or "it has no perception tokens",
        parameters=f"{sum(map(math.prod, shapes.values())):,}", sources=list(_sources(config)),
        actions=", ".join(f"{kind} {share:g}" for kind, share in config.data.actions.items()), recipe=_recipe(config),
        numbers=[(name, metrics_table(summary).as_text()) for name, summary in summaries.items()],
        ablations=[(name, ablation_table(compared).as_text()) for name, compared in ablations.items()],
        pictures=pictures, limits=list(_limits(summaries, ablations)),
    )  # fmt: skip
    (folder / CARD).write_text(text, encoding="utf-8")


def _summaries(run: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """What a run's final answers and each of its evaluations came to, under a heading."""
    for folder, summary in run_summaries(run).items():
        if summary.get("metrics"):
            name = "At the end of training" if folder == run else f"Evaluation `{folder.name}`"
            yield f"{name}, {summary['questions']:,} questions:", summary


def _sources(config: TrainConfig) -> Iterator[tuple[str, str, str, float]]:
    for split in ("train", "test"):
        for name, source in getattr(config.data, split).items():
            yield split, name, source.target, source.weight


def _recipe(config: TrainConfig) -> list[tuple[str, str]]:
    optim, training, lora = config.optim, config.training, config.model.lora
    return [
        ("steps, rows of a step", f"{training.steps:,}, {training.batch_size}"),
        ("learning rate, weight decay", f"{optim.lr:g}, {optim.weight_decay:g}"),
        ("precision, weights", f"{training.precision}, {config.model.dtype}"),
        ("adapters", f"LoRA of rank {lora.rank}" if lora.rank else "none"),
        ("inner passes, control tokens", f"{config.model.num_inner_forward_run}, {config.model.projector_scale}"),
        ("masking", f"paragraphs {config.masking.para_mask_id}, {config.masking.para_mask_ratio:.0%} of rows"),
        ("started from", config.init_from or config.model.path or "random weights"),
        ("seed", str(config.seed)),
    ]


def _limits(summaries: dict[str, Any], ablations: dict[str, dict[str, Comparison]]) -> Iterator[str]:
    """Sentences about what the numbers leave open."""
    names = sorted({source for summary in summaries.values() for source in summary["metrics"]})
    yield f"Anything beyond the data it was tested on ({', '.join(names)})." if names else "How well it answers."
    yield "How much the numbers change with the seed of training: it is one run."
    if not ablations:
        yield "That perception does the work: no ablation was run (`python eval.py checkpoint=FOLDER +ablations=all`)."
    compared = {name: one for found in ablations.values() for name, one in found.items()}
    for one in compared.values():
        if one.difference and one.difference.low <= 0 <= one.difference.high:
            yield f"That it matters: {one.description}. The interval of the difference holds 0."
    if "baseline" not in compared:
        yield "That it is better than the same data without perception tokens: no such model was compared with."
