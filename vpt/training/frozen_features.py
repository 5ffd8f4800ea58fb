"""Open the feature cache for a model: which of its encoders are frozen, and the fingerprint of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from torch import nn

from vpt.config.schema import DataConfig, TrainConfig
from vpt.data.feature_cache import FeatureCache
from vpt.distributed.dtensor import full_tensor
from vpt.models.build import ModelBundle
from vpt.models.vpt import VPTModel, is_trained
from vpt.perception.batch import VISION_TOWER
from vpt.training.optimizer import set_trainable


def open_feature_cache(config: DataConfig, model: VPTModel, *, precision: str) -> FeatureCache | None:
    """The cache for the frozen encoders of `model`; reads their weights, so these must be final.

    Returns None where `data.feature_cache` asks for none. `requires_grad` must be set; `precision` is what the model
    runs in, such as `bf16`.
    """
    if config.feature_cache is None:
        return None
    modules = {model.transform_of(name): vision for name, vision in model.visions.items()}
    modules[VISION_TOWER] = model.tower
    fingerprints = {name: fingerprint(m, precision) for name, m in modules.items() if not is_trained(m)}
    return FeatureCache(Path(config.feature_cache), int(config.feature_cache_gb * 2**30), fingerprints)


@contextmanager
def shared_features(bundle: ModelBundle, config: TrainConfig) -> Iterator[None]:
    """Let a loaded model of a run answer with cached features of its frozen encoders, and add to them.

    It answers in float32, but under `model.frozen_dtype` as it was trained. Sets `requires_grad` as the run does, by
    which encoders are told to be frozen.
    """
    precision = config.training.precision if config.model.frozen_dtype else "fp32"
    set_trainable(bundle.model, config.optim, tower_pretrained=config.model.path is not None)
    cache = open_feature_cache(config.data, bundle.model, precision=precision)
    processor = bundle.processor
    bundle.model.feature_cache, bundle.processor = cache, processor.with_feature_cache(cache)
    try:
        yield
    finally:
        bundle.model.feature_cache, bundle.processor = None, processor
        if cache is not None:
            cache.flush()


def fingerprint(module: nn.Module, precision: str) -> str:
    """A digest of an encoder's layers, configuration, weights and precision: its features depend on nothing else."""
    digest = blake2b(f"{module} {_settings(module)} {precision}".encode(), digest_size=20)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(full_tensor(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(module: nn.Module) -> str:
    """transformers' configuration of an encoder, without the folder that it was loaded from."""
    config = getattr(module, "config", None)
    settings = config.to_dict() if config is not None else {}
    return repr(sorted((key, value) for key, value in settings.items() if key != "_name_or_path"))
