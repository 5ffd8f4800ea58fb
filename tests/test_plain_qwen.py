"""Without perception tokens the model is transformers' own Qwen2-VL and Qwen2.5-VL."""

import pytest
import torch

from conftest import FAMILIES, conversation, samples_of
from vpt.data.packing import pack
from vpt.vision import see


def plain_samples(parts, folder):
    text = {"messages": [{"role": "user", "content": "is a circle round?"}, {"role": "assistant", "content": "yes"}]}
    two = conversation("1.png", answer="brown")
    two["messages"][0]["content"] = "<image> and <image>\nare they alike?"
    two["images"] = ["1.png", "3.png"]
    return samples_of(parts, folder, [conversation("0.png"), conversation("2.png"), two, text])


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_equal_transformers(make_parts, folder, family):
    parts = make_parts("encoder=[]", *FAMILIES[family])
    theirs = parts.model.qwen
    for sample in plain_samples(parts, folder):
        batch = pack([sample])
        ours = parts.model(batch, keep_logits=True)
        images = batch.looks.get("image")
        vision = {} if images is None else {
            "pixel_values": images.pixels, "image_grid_thw": torch.tensor(images.grids),
            "mm_token_type_ids": (batch.input_ids == parts.model.vocabulary.image_pad).int()[None],
        }  # fmt: skip
        theirs.set_attn_implementation("eager")
        want = theirs(input_ids=batch.input_ids[None], **vision).logits[0]
        theirs.set_attn_implementation("vpt_segments")
        torch.testing.assert_close(ours.logits, want[ours.at], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_tower_equals_transformers(make_parts, folder, family):
    parts = make_parts("encoder=[]", *FAMILIES[family])
    images = pack(plain_samples(parts, folder)).looks["image"]
    visual = parts.model.qwen.model.visual
    visual.set_attn_implementation("eager")
    want = visual(images.pixels, grid_thw=torch.tensor(images.grids)).pooler_output
    torch.testing.assert_close(see(visual, images.pixels, images.grids), want, rtol=1e-4, atol=1e-5)
