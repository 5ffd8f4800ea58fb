"""Open the feature cache for a model: which of its encoders are frozen, and the fingerprint of each."""

from collections.abc import Iterator
from contextlib import contextmanager
from hashlib import blake2b
from pathlib import Path

import torch
from torch import nn

from vpt.config.schema import DataConfig
from vpt.data.feature_cache import FeatureCache
from vpt.distributed.dtensor import full_tensor
from vpt.models.build import ModelBundle
from vpt.models.vpt import VPTModel, is_trained
from vpt.perception.batch import VISION_TOWER


def open_feature_cache(config: DataConfig, model: VPTModel, *, precision: str) -> FeatureCache | None:
    """A cache for the frozen encoders of `model`, whose weights are final; all of them are read once for it.

    Args:
        config: `feature_cache` and `feature_cache_gb`. Returns None where they ask for no cache.
        model: with what is trained chosen.
        precision: what it runs in, such as `bf16`.
    """
    if config.feature_cache is None:
        return None
    modules = {model.transform_of(name): vision for name, vision in model.visions.items()}
    modules[VISION_TOWER] = model.tower
    fingerprints = {name: fingerprint(m, precision) for name, m in modules.items() if not is_trained(m)}
    return FeatureCache(Path(config.feature_cache), int(config.feature_cache_gb * 2**30), fingerprints)


@contextmanager
def shared_features(parts: ModelBundle, config: DataConfig) -> Iterator[None]:
    """Meanwhile `parts` answer (in float32) with what has been kept, and keep what they see anew.

    Args:
        parts: a model whose parameters say which of its encoders are frozen.
        config: as for `open_feature_cache`.
    """
    store = open_feature_cache(config, parts.model, precision="fp32")
    encoder = parts.processor
    parts.model.feature_cache, parts.processor = (
        store,
        encoder.with_feature_cache(store) if store is not None else encoder,
    )
    try:
        yield
    finally:
        parts.model.feature_cache, parts.processor = None, encoder
        if store is not None:
            store.flush()


def fingerprint(module: nn.Module, precision: str) -> str:
    """A digest of an encoder: what it computes from pixels depends on nothing else."""
    digest = blake2b(f"{module} {_settings(module)} {precision}".encode(), digest_size=20)
    for name, tensor in sorted(module.state_dict().items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(full_tensor(tensor.detach()).cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _settings(module: nn.Module) -> str:
    """What transformers' configuration says of an encoder, but for where it was loaded from."""
    config = getattr(module, "config", None)
    settings = config.to_dict() if config is not None else {}
    return repr(sorted((key, value) for key, value in settings.items() if key != "_name_or_path"))
