"""Tokens of single images are those of a batch's forward pass, however many are encoded at a time."""

import pytest
import torch

from conftest import mixed_records, samples_of
from vpt.data.collate import collate
from vpt.models import image_tokens as module
from vpt.models.image_tokens import image_tokens


@pytest.mark.parametrize("pixels", [1, 10**9])
@torch.no_grad()
def test_they_are_those_of_a_batch(all_parts, folder, monkeypatch, pixels):
    monkeypatch.setattr(module, "MICRO_BATCH_PIXELS", pixels)
    model = all_parts.model.eval()
    samples = samples_of(all_parts, folder, mixed_records())
    batch = collate(samples)
    want = model.project_features(model.encode_images(batch.images), batch)
    for source in ("image", "clip", "dino", "sam"):
        images = {key: image for sample in samples for key, image in sample.images.get(source, ())}
        got = image_tokens(model, source, [*images.values()])
        blocks = [(block, sample) for sample in samples for block in sample.row.blocks if block.source == source]
        assert blocks and len(got) == sum(image.tokens for image in images.values())
        own = dict(zip(images, got.split([image.tokens for image in images.values()]), strict=True))
        offsets = dict(zip(_transform_keys(samples, model, source), _split(batch, want, model, source), strict=True))
        for key, tokens in own.items():
            torch.testing.assert_close(tokens, offsets[key], rtol=1e-4, atol=1e-5)


def _transform_keys(samples, model, source):
    """Images of the source's transform, in the order in which a batch meets them."""
    transform = model.transform_of(source)
    return list({
        key: None
        for sample in samples for name, entries in sample.images.items() if sample.transforms[name] == transform
        for key, _ in entries
    })  # fmt: skip


def _split(batch, want, model, source):
    return want[source].split(batch.images[model.transform_of(source)].tokens)
