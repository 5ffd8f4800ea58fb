"""What frozen encoders cost: the tower beside transformers' own walk over it, features from disk beside none."""

import tempfile
from dataclasses import replace

import torch
from torch import Tensor
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.batch import Looks
from vpt.bench import models
from vpt.bench.figures import Figure, ratio, training_step
from vpt.bench.models import medium
from vpt.bench.talks import ENCODER, Talk, batch_of
from vpt.config import DataConfig
from vpt.features import FeatureStore
from vpt.vision import see

IMAGES = 32
# (rows, columns) in patches: thumbnails to 448 x 336 pixels
TOWER_SIZES = {"depth": 4, "embed_dim": 320, "num_heads": 4, "hidden_size": 128, "patch_size": 14}
SIZES = ((8, 8), (10, 14), (16, 16), (12, 20), (24, 32), (16, 24), (14, 10), (20, 20))


def measure() -> list[Figure]:
    """The tower, and a re-encoder that has been there before."""
    return [vision_tower(), cached_features()]


def vision_tower() -> Figure:
    """Our frozen tower over images of mixed size / transformers' own forward of it, both without gradients."""
    torch.manual_seed(0)
    config = Qwen2VLConfig(
        vocab_size=64, hidden_size=128, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]}, vision_config=TOWER_SIZES,
        bos_token_id=0, eos_token_id=0, attn_implementation="sdpa",
    )  # fmt: skip
    visual = Qwen2VLForConditionalGeneration(config).model.visual.requires_grad_(False)
    grids = [(1, *SIZES[i % len(SIZES)]) for i in range(IMAGES)]
    pixels = torch.randn(sum(rows * columns for _, rows, columns in grids), 3 * 2 * 14 * 14)

    @torch.no_grad()
    def ours() -> None:
        see(visual, pixels, grids)

    @torch.no_grad()
    def theirs() -> None:
        visual(pixels, grid_thw=torch.tensor(grids))

    return Figure("vision_tower", ratio(ours, theirs), 0.8)


def cached_features() -> Figure:
    """A step whose re-encoder's features are read from disk / computed."""
    model = medium(dino=models.BASE_DINO)
    batch = batch_of(model, [Talk(perceives=True)])
    images, key = batch.looks[ENCODER], "0" * 40
    with tempfile.TemporaryDirectory() as folder:
        store = FeatureStore.open(DataConfig(feature_cache=folder), model, precision="fp32")
        assert store is not None
        with torch.no_grad():
            store.keep(replace(images, keys=[key]), model.look({ENCODER: images})[ENCODER])
        store.finish()

        def found() -> Tensor:
            look = store.get(key)
            assert look is not None
            assert look.features is not None
            known = Looks(look.pixels, images.tokens, known={0: look.features})
            return model(replace(batch, looks={**batch.looks, ENCODER: known})).loss_sum

        cached, computed = training_step(model, found), training_step(model, lambda: model(batch).loss_sum)
        return Figure("cached_features", ratio(cached, computed), 0.8)
