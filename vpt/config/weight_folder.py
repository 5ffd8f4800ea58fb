"""What the `config.json` of a folder of weights says, before anything is built or read of it."""

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from vpt.config.evaluation import WeightsPath
from vpt.config.schema import ModelConfig, TrainConfig
from vpt.errors import ConfigError, wrap_read_errors

UPSTREAM = "qwen2_vl_vpt"  # the model type of upstream's checkpoints
ASSETS = Path(__file__).resolve().parents[1] / "assets"  # weights that are installed with the package
_GROUPS = Path(__file__).resolve().parents[2] / "conf" / "model"


def weight_paths(config: TrainConfig) -> dict[str, str]:
    """`model.path`, `encoder.X.path` -> folder or hub name of every part of a model that has pretrained weights."""
    paths = {"model.path": config.model.path} | {
        f"encoder.{n}.path": node.weights for n, node in config.encoder.items()
    }
    return {key: path for key, path in paths.items() if path is not None}


def moved_paths(model: WeightsPath, encoder: Mapping[str, WeightsPath]) -> dict[str, str]:
    """Key -> path of every part that a program is told the place of, by keys as those of `weight_paths`."""
    paths = {"model.path": model.path} | {f"encoder.{name}.path": node.path for name, node in encoder.items()}
    return {key: path for key, path in paths.items() if path is not None}


def read_settings(folder: Path | None, name: str = "config.json") -> dict[str, Any]:
    """A JSON file of a folder, empty where there is none. Raises CheckpointError where it is broken."""
    file = folder / name if folder else None
    if file is None or not file.is_file():
        return {}
    with wrap_read_errors(file, "copy or download it again"):
        config = json.loads(file.read_text(encoding="utf-8"))
        if not isinstance(config, dict):
            raise ValueError("it is not an object of keys and values")
    return config


def check_weight_folder(path: str | None, key: str, model_types: Collection[str] | None) -> None:
    """Raise ConfigError unless `path`, which `key` names, is a folder of one of these types, or is spelt OWNER/NAME."""
    if path is None:
        return
    if model_types is not None and not model_types:
        raise ConfigError(f"{key}={path} has no effect: this encoder has no weights of its own; leave {key} out")
    folder = Path(path)
    try:
        is_folder, is_file = folder.is_dir(), folder.is_file()
    except (OSError, ValueError):  # a name too long, or with a NUL
        is_folder = is_file = False
    if is_file:
        raise ConfigError(f"{key}={path} is a file; type {key}=FOLDER, the folder with config.json and its tensors")
    if not is_folder:
        if path.startswith((".", "/", "~")) or path.count("/") != 1:
            raise ConfigError(
                f"{key}: folder {path} does not exist; type {key}=FOLDER, where they are now, or a hub name OWNER/NAME"
            )
        return
    found = read_settings(folder).get("model_type")
    if found is None:
        holds = "holds no config.json that names a model type" if any(folder.iterdir()) else "is empty"
        raise ConfigError(f"{key}={path} {holds}; copy or download the weights again, or give another folder")
    if model_types is not None and found not in model_types:
        fix = f"type model={model_group(folder)}" if key == "model.path" and model_group(folder) else "give another one"
        raise ConfigError(f"{key}={path} holds {found} instead of {' or '.join(sorted(model_types))}; {fix}")


def model_group(folder: Path) -> str | None:
    """The option of `model=` that goes with a folder: of its family, and the nearest in width."""
    from omegaconf import OmegaConf  # the GPU bench, which asks for no group, runs without it

    config = read_settings(folder)
    family, width = str(config.get("model_type")).removesuffix("_vpt"), _width(config)
    near: dict[int, str] = {}
    for file in sorted(_GROUPS.glob("*.yaml")):
        settings: Any = OmegaConf.load(file)
        group = settings.get("model")  # none in some of those of tiny models
        if group and group.size == "full" and group.family == family:
            near[abs(_width(group.config) - width)] = file.stem
    return near[min(near)] if near else None


def _width(config: Any) -> int:
    """`hidden_size` of the language model in a flat or a nested configuration of transformers."""
    return (config.get("text_config") or {}).get("hidden_size") or config.get("hidden_size") or 0


def check_model_group(model: ModelConfig, typed: Collection[str]) -> None:
    """Raise ConfigError where a `model.path` of one's own would be trained with the encoders and rates of tiny or small
    models, unasked for.
    """
    asked = any(text.startswith(("model=", "model.size=")) for text in typed)
    if model.path is None or Path(model.path).is_relative_to(ASSETS) or model.size == "full" or asked:
        return
    raise ConfigError(
        f"model.path={model.path} alone is trained with the encoders and rates of {model.size} models; type "
        f"model={model_group(Path(model.path)) or 'NAME'} with it (model={model.size} is what it was)"
    )
