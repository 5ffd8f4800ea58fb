"""Time of our tower over transformers' own, and of cached features over encoding."""

import tempfile
from dataclasses import replace

import torch
from torch import Tensor

from vpt.bench.measure import Measurement, ratio, training_step
from vpt.bench.models import BASE_DINO, ENCODER, SMALL, qwen_sizes
from vpt.config.schema import DataConfig
from vpt.data.synthetic import synthetic_batch
from vpt.perception.batch import ImageInputs
from vpt.training.frozen_features import open_feature_cache

IMAGES = 32
# (rows, columns) in patches: thumbnails to 448 x 336 pixels
TOWER = {"depth": 4, "embed_dim": 320, "num_heads": 4, "hidden_size": 128, "patch_size": 14}
SIZES = ((8, 8), (10, 14), (16, 16), (12, 20), (24, 32), (16, 24), (14, 10), (20, 20))


def measure() -> list[Measurement]:
    """The tower, and a re-encoder whose features are cached."""
    return [vision_tower(), cached_features()]


def vision_tower() -> Measurement:
    """Our frozen tower over images of mixed size / transformers' own forward of it, both without gradients."""
    model = replace(SMALL, qwen=qwen_sizes(128, 1, 2, vision_config=TOWER)).build().model
    [visual] = model.tower.transformers_tower
    visual.set_attn_implementation("sdpa")
    grids = [(1, *SIZES[i % len(SIZES)]) for i in range(IMAGES)]
    pixels = torch.randn(sum(rows * columns for _, rows, columns in grids), 3 * 2 * 14 * 14)
    sides = (lambda: model.tower(pixels, grids)), (lambda: visual(pixels, grid_thw=torch.tensor(grids)))
    with torch.no_grad():
        return Measurement("vision_tower", ratio(*sides), 0.8)


def cached_features() -> Measurement:
    """A step whose re-encoder's features are read from disk / computed."""
    bundle = replace(SMALL, dino=BASE_DINO).build()
    model, batch = bundle.model, synthetic_batch(bundle.processor, [SMALL.row])
    images, key = batch.images[ENCODER], "0" * 40
    with tempfile.TemporaryDirectory() as folder:
        store = open_feature_cache(DataConfig(feature_cache=folder), model, precision="fp32")
        assert store is not None
        with torch.no_grad():
            store.put(replace(images, cache_keys=[key]), model.encode_images({ENCODER: images})[ENCODER])
        store.flush()

        def found() -> Tensor:
            stored = store.get(key)
            assert stored is not None
            assert stored.features is not None
            known = ImageInputs(stored.pixels, images.tokens, cached={0: stored.features})
            return model(replace(batch, images={**batch.images, ENCODER: known})).loss_sum

        return Measurement("cached_features", ratio(training_step(model, found), training_step(model, batch)), 0.8)
