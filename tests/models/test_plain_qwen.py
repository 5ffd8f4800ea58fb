"""Without perception tokens the model is transformers' own: logits, gradients, the tower, of every family."""

from copy import deepcopy

import pytest
import torch
from torch.nn import functional as F

from conftest import FAMILIES, conversation, qwen_inputs, samples_of, video, video_conversation
from vpt.data.collate import collate
from vpt.models import vision_tower

# Windows of 8x8 patches, as published; the images then have 8x8, 12x6, 10x14 and 24x18 patches, a frame 10x6.
WINDOWS = ("model=tiny_2_5", "model.config.vision_config.window_size=64")
BLOCKS = {"one": "[2]", "first and last": "[0,2]", "all": "[0,1,2]"}
VARIANTS = {
    "qwen2_vl": (),
    **{
        f"qwen2_5_vl, {name} whole": (*WINDOWS, f"model.config.vision_config.fullatt_block_indexes={blocks}")
        for name, blocks in BLOCKS.items()
    },
    "qwen3_vl": ("model=tiny_3",),
}
# Weights of this width keep float32's rounding small enough to compare gradients at 1e-5.
MODEST = ("model.config.initializer_range=0.04", "model.config.vision_config.initializer_range=0.04")


def asking(text: str, **media: list) -> dict:
    return {**conversation("", answer="brown"), "images": [], **media} | {
        "messages": [{"role": "user", "content": text}, {"role": "assistant", "content": "brown"}]
    }


ROWS = {
    "one image": asking("<image>\nwhat is it?", images=["0.png"]),
    "an image wider than a window": asking("<image>\nwhat is it?", images=["1.png"]),
    "an image that fits windows in neither direction": asking("<image>\nwhat is it?", images=["2.png"]),
    "several images": asking("<image> and <image>, <image>\nare they alike?", images=["1.png", "3.png", "0.png"]),
    "text": asking("is a circle round?"),
    "a video": video_conversation(video()),
    "a long video": video_conversation(video(fps=0.25)),  # its last step lies past max(h, w)
    "images and videos": asking(
        "<video><image>\nand <video>?", images=["2.png"], videos=[video(4, fps=1.0), video(1, fps=2.0)]
    ),
}  # fmt: skip


def both(parts, sample):
    """(logits, gradients) at labelled positions: ours and transformers'."""
    model, batch = parts.model, collate([sample])
    model.zero_grad()
    out = model(batch, keep_logits=True)
    out.loss_sum.backward()
    ours = (out.logits, gradients(model))
    inputs = qwen_inputs(parts, sample)
    for pad, key in ((model.vocabulary.image_pad, "pixel_values"), (model.vocabulary.video_pad, "pixel_values_videos")):
        own = [b for b in sample.row.blocks if sample.ids[b.start] == pad and not b.offset]
        looks = [sample.images[b.source][b.image][1] for b in own]
        inputs |= {key: torch.cat([look.pixels for look in looks])} if looks else {}
    plain = type(model.qwen)(deepcopy(model.qwen.config))
    plain.load_state_dict(model.qwen.state_dict())
    plain.set_attn_implementation("eager")
    logits = plain(**inputs).logits[0, out.positions].float()
    F.cross_entropy(logits, out.targets, reduction="sum").backward()
    return ours, (logits, {f"qwen.{name}": gradient for name, gradient in gradients(plain).items()})


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("row", ROWS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_logits_and_gradients_equal_transformers(make_parts, folder, variant, row):
    parts = make_parts("encoder=[]", *VARIANTS[variant], *MODEST)
    [sample] = samples_of(parts, folder, [ROWS[row]])
    (logits, ours), (want, theirs) = both(parts, sample)
    torch.testing.assert_close(logits, want, rtol=1e-5, atol=1e-5)
    assert ours.keys() == theirs.keys()
    assert any("visual" in name for name in ours) == (row != "text")
    for name, gradient in theirs.items():
        scale = gradient.abs().max()
        # The gradient of a key's bias is zero but for rounding.
        assert (ours[name] - gradient).abs().max() <= 1e-5 * scale + 1e-7, name


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_equal_transformers_row_by_row(make_parts, folder, family):
    parts = make_parts("encoder=[]", *FAMILIES[family], *MODEST)
    samples = samples_of(parts, folder, list(ROWS.values()))
    packed = parts.model(collate(samples), keep_logits=True).logits
    alone = torch.cat([both(parts, sample)[1][0] for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_tower_equals_transformers(make_parts, folder, variant):
    parts = make_parts("encoder=[]", *VARIANTS[variant])
    images = collate(samples_of(parts, folder, list(ROWS.values()))).images["image"]
    assert {grid[0] for grid in images.grids} == {1, 2, 4}
    [theirs] = parts.model.tower.transformers_tower
    theirs.set_attn_implementation("eager")
    out = theirs(images.pixels, grid_thw=torch.tensor(images.grids))
    want = torch.cat([out.pooler_output, *(out.get("deepstack_features") or [])], dim=1)
    torch.testing.assert_close(parts.model.tower(images.pixels, images.grids), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_frozen_tower_sees_a_bundle_at_a_time(make_parts, folder, family, monkeypatch):
    """Without gradients images go through in bundles of a shape; they come back in their own order."""
    parts = make_parts("encoder=[]", *FAMILIES[family])
    images = collate(samples_of(parts, folder, list(ROWS.values()))).images["image"]
    tower = parts.model.tower
    monkeypatch.setattr(vision_tower, "MICRO_BATCH_PATCHES", (64, 64))
    assert len(list(vision_tower._micro_batches(images.grids, limit=64))) > 2
    with torch.no_grad():
        bundled = tower(images.pixels, images.grids)
    torch.testing.assert_close(bundled, tower(images.pixels, images.grids), rtol=1e-4, atol=1e-5)
