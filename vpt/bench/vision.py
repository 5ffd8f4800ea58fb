"""Time of our tower over transformers' own, and of cached features over encoding."""

import tempfile
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.bench.measure import Measurement, ratio, training_step
from vpt.bench.models import BASE_DINO, build_50m
from vpt.bench.synthetic import ENCODER, SyntheticRow, synthetic_batch
from vpt.config.schema import DataConfig
from vpt.models.families import family_of
from vpt.models.vision_tower import VisionTower
from vpt.perception.batch import ImageInputs
from vpt.training.frozen_features import open_feature_cache

IMAGES = 32
# (rows, columns) in patches: thumbnails to 448 x 336 pixels
TOWER_SIZES = {"depth": 4, "embed_dim": 320, "num_heads": 4, "hidden_size": 128, "patch_size": 14}
SIZES = ((8, 8), (10, 14), (16, 16), (12, 20), (24, 32), (16, 24), (14, 10), (20, 20))


def measure() -> list[Measurement]:
    """The tower, and a re-encoder that has been there before."""
    return [vision_tower(), cached_features()]


def vision_tower() -> Measurement:
    """Our frozen tower over images of mixed size / transformers' own forward of it, both without gradients."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}, vision_config=TOWER_SIZES,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    visual = Qwen2VLForConditionalGeneration(config).model.visual.requires_grad_(False)
    tower = VisionTower(visual, family_of("qwen2_vl"))
    grids = [(1, *SIZES[i % len(SIZES)]) for i in range(IMAGES)]
    pixels = torch.randn(sum(rows * columns for _, rows, columns in grids), 3 * 2 * 14 * 14)

    @torch.no_grad()
    def ours() -> None:
        tower(pixels, grids)

    @torch.no_grad()
    def theirs() -> None:
        visual(pixels, grid_thw=torch.tensor(grids))

    return Measurement("vision_tower", ratio(ours, theirs), 0.8)


def cached_features() -> Measurement:
    """A step whose re-encoder's features are read from disk / computed."""
    model = build_50m(dino=BASE_DINO)
    batch = synthetic_batch(model, [SyntheticRow(perceives=True)])
    images, key = batch.images[ENCODER], "0" * 40
    with tempfile.TemporaryDirectory() as folder:
        store = open_feature_cache(DataConfig(feature_cache=folder), model, precision="fp32")
        assert store is not None
        with torch.no_grad():
            store.put(replace(images, cache_keys=[key]), model.encode_images({ENCODER: images})[ENCODER])
        store.flush()

        def found() -> Tensor:
            look = store.get(key)
            assert look is not None
            assert look.features is not None
            known = ImageInputs(look.pixels, images.tokens, cached={0: look.features})
            return model(replace(batch, images={**batch.images, ENCODER: known})).loss_sum

        cached, computed = training_step(model, found), training_step(model, lambda: model(batch).loss_sum)
        return Measurement("cached_features", ratio(cached, computed), 0.8)
