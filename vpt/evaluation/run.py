"""`eval.py` after its configuration has been checked."""

from dataclasses import replace
from pathlib import Path

from vpt.config import EvalConfig
from vpt.errors import ConfigError
from vpt.evaluation.pictures import draw_sheet
from vpt.evaluation.runner import evaluate
from vpt.freeze import generation_settings
from vpt.pretrained import configuration, load
from vpt.training import checkpoint


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Evaluate `config.checkpoint` on its own test split and say what it reached."""
    if config.data.root is not None and not Path(config.data.root).is_dir():
        raise ConfigError(f"data.root={config.data.root} is not a folder; type data.root=FOLDER")
    trained = configuration(config.checkpoint)
    generation = generation_settings(trained, config.generation)  # before any weights are read
    parts = load(config.checkpoint, device=config.device)
    if config.data.max_length is not None:
        parts.encoder.max_length = config.data.max_length
    root = config.data.root or trained.data.root
    merged = replace(trained, generation=generation, data=replace(trained.data, root=root))
    folder = checkpoint.run_of(config.checkpoint) / "eval" / config.name
    limit = config.data.limit if config.data.limit is not None else trained.data.limit
    summary = evaluate(parts, merged, folder, limit=limit)
    print(f"accuracy {summary['accuracy']:.4f} on {summary['questions']} questions; see {folder}/summary.json")
    if config.pictures:
        print(f"  {draw_sheet(folder, merged)}")
