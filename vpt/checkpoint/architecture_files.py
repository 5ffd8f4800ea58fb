"""`sizes/` of a checkpoint: one JSON file of transformers' configuration for Qwen and for each re-encoder."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from vpt.errors import CheckpointError, wrap_read_errors
from vpt.models.architecture import Architecture

QWEN = "qwen"  # the file of the language model's configuration; encoders' files carry their names
FIX = "copy the checkpoint again, or use an older one"
MAX_SIZE = 1 << 31  # no size, id or position of a model is larger
_NO_COUNTS = ("max_window_layers",)  # a number of a layer, which need not exist
# transformers would fetch or run what they name
_NOT_SIZES = ("auto_map", "attn_implementation", "_attn_implementation", "_attn_implementation_internal",
              "experts_implementation", "_experts_implementation", "quantization_config")  # fmt: skip


def save_architecture(architecture: Architecture, folder: Path) -> None:
    """Write one JSON file for each part."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, config in {QWEN: architecture.qwen, **architecture.encoders}.items():
        (folder / f"{name}.json").write_text(json.dumps(config, indent=1, sort_keys=True))


def load_architecture(folder: Path) -> Architecture:
    """Parse the files of `save_architecture`. Raises CheckpointError where one is missing or broken."""
    found: dict[str, dict[str, Any]] = {}
    for path in sorted(folder.glob("*.json")):
        with wrap_read_errors(path, FIX):
            found[path.stem] = json.loads(path.read_text(encoding="utf-8"))
            if not isinstance(found[path.stem], dict):
                raise ValueError("it is not an object of keys and values")
    if QWEN not in found:
        raise CheckpointError(f"{folder / QWEN}.json is missing; {FIX}")
    return Architecture(found.pop(QWEN), found)


def check_architecture(architecture: Architecture, *, where: Path, tensors: int) -> None:
    """Raise CheckpointError for sizes that no model has (more layers than `tensors` stored), and for code to run."""
    for part, config in {QWEN: architecture.qwen, **architecture.encoders}.items():
        for key, value in _entries(config):
            if key in _NOT_SIZES:
                raise CheckpointError(f"{where}, {part}: {key} says what code to run, not a size; remove it")
            limit = tensors if "layers" in key or key == "depth" else MAX_SIZE
            if isinstance(value, int | float) and key not in _NO_COUNTS and not abs(value) <= limit:
                raise CheckpointError(f"{where}, {part}: {key}={value:.3g} is beyond {limit:,}; {FIX}")


def _entries(tree: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Every key with its value; values of a list have its key."""
    if isinstance(tree, dict):
        for name, value in tree.items():
            yield str(name), value
            yield from _entries(value, str(name))
    elif isinstance(tree, list):
        for value in tree:
            yield key, value
            yield from _entries(value, key)
