"""`eval.py` after its configuration has been checked."""

from dataclasses import replace
from pathlib import Path

from vpt.build import Parts, build
from vpt.config import EvalConfig, TrainConfig
from vpt.errors import ConfigError
from vpt.evaluation.pictures import draw_sheet
from vpt.evaluation.runner import evaluate
from vpt.freeze import generation_settings
from vpt.training import checkpoint
from vpt.training.loop import choose_device


def load_checkpoint(path: str | Path, *, device: str = "auto") -> tuple[Parts, TrainConfig]:
    """A trained model, ready to answer, and the configuration it was trained with."""
    found = checkpoint.find(path)
    config = checkpoint.load_config(found)
    # Sizes come from the base model's folder, weights from the checkpoint.
    parts = build(config, tokenizer=checkpoint.load_tokenizer(found))
    checkpoint.load_weights(found, parts.model)
    parts.model.to(choose_device(device)).eval()
    return parts, config


def evaluate_checkpoint(config: EvalConfig) -> None:
    """Evaluate `config.checkpoint` on its own test split and say what it reached."""
    found = checkpoint.find(config.checkpoint)
    if config.data.root is not None and not Path(config.data.root).is_dir():
        raise ConfigError(f"data.root={config.data.root} is not a folder; type data.root=FOLDER")
    generation = generation_settings(checkpoint.load_config(found), config.generation)  # before any weights are read
    parts, trained = load_checkpoint(found, device=config.device)
    if config.data.max_length is not None:
        parts.encoder.max_length = config.data.max_length
    root = config.data.root or trained.data.root
    merged = replace(trained, generation=generation, data=replace(trained.data, root=root))
    run = found.parent.parent if found.parent.name == "checkpoints" else found
    folder = run / "eval" / config.name
    limit = config.data.limit if config.data.limit is not None else trained.data.limit
    summary = evaluate(parts, merged, folder, limit=limit)
    print(f"accuracy {summary['accuracy']:.4f} on {summary['questions']} questions; see {folder}/summary.json")
    if config.pictures:
        print(f"  {draw_sheet(folder, merged)}")
