"""DINOv2 with registers, DINOv3, SAM 2 and SigLIP 2: features of the stock models, alone and all in one model."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from transformers.models.bit.image_processing_pil_bit import BitImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

from conftest import action_turns, conversation
from helpers.gradients import MODEST, as_double, assert_same, losses_and_gradients
from vpt.data.collate import collate
from vpt.data.records import parse_record
from vpt.data.references import ImageRef
from vpt.errors import ConfigError

TOKENS = {"dino_registers": "dinoreg", "dino3": "dino3", "sam2": "sam2", "siglip2": "siglip2"}
COUNTS = {"dino_registers": 16, "dino3": 16, "sam2": 16, "siglip2": 16}
DINO = BitImageProcessorPil(
    size={"shortest_edge": 64}, crop_size={"height": 56, "width": 56}, image_mean=[0.485, 0.456, 0.406],
    image_std=[0.229, 0.224, 0.225],
)  # fmt: skip
SIGLIP = SiglipImageProcessorPil(
    size={"height": 64, "width": 64}, resample=2, image_mean=[0.5] * 3, image_std=[0.5] * 3
)


@pytest.fixture(scope="module")
def parts(make_parts):
    return make_parts(
        f"encoder=[{','.join(TOKENS)}]", "data.actions={none: 1}", "encoder.dino_registers.options.view=centre", *MODEST
    )


@pytest.fixture(scope="module")
def image(folder):
    return folder.image(ImageRef("3.png"), where="")


@torch.no_grad()
@pytest.mark.parametrize("name", TOKENS)
def test_features_are_the_stock_models(parts, image, name):
    encoder = parts.model.encoder(name).eval()
    look = parts.processor.transforms[name](image)
    assert look.tokens == COUNTS[name]
    pixels = look.pixels[None]
    if processor := {"dino_registers": DINO, "siglip2": SIGLIP}.get(name):  # Pillow has no other one
        theirs = torch.as_tensor(processor(images=[image])["pixel_values"][0])[None]
        assert torch.equal(pixels, theirs) or (pixels - theirs).abs().max() < 1e-6
    out = encoder.vision(pixel_values=pixels)
    want = {
        "dino_registers": lambda: out.last_hidden_state[0, 3:], "dino3": lambda: out.last_hidden_state[0, 3:],
        "siglip2": lambda: out.last_hidden_state[0], "sam2": lambda: out.fpn_hidden_states[2][0].flatten(1).T,
    }[name]()  # fmt: skip
    torch.testing.assert_close(encoder.forward_features(pixels), want)


def test_all_in_one_model(parts, folder):
    turns = [action_turns(token) for token in TOKENS.values()]
    images = {f"{token}_images": ["3.png"] for token in TOKENS.values()}
    record = parse_record(conversation("0.png", *turns, **images), where="", encoder_tokens=TOKENS)
    batch = as_double(collate([parts.processor.encode_conversation(record, folder)]))
    parts = replace(parts, model=deepcopy(parts.model).double())
    shared = losses_and_gradients(parts, batch, "shared")
    assert_same(shared, losses_and_gradients(parts, batch, "full"))
    for name in TOKENS:
        assert any(name in key and "vision" in key for key in shared[1])
        unused = {id(p) for part in parts.model.encoder(name).unused_modules() for p in _parameters(part)}
        with_none = {
            key
            for key, p in parts.model.encoder(name).vision.named_parameters()
            if p.grad is None and id(p) not in unused
        }
        assert not with_none or all("head" in key or "post_layernorm" in key for key in with_none), (name, with_none)


def _parameters(part):
    return [part] if isinstance(part, torch.nn.Parameter) else part.parameters()


def test_levels_and_families_are_checked(make_parts):
    with pytest.raises((ConfigError, ValueError), match=r"options\.level=7 does not make"):
        make_parts("encoder=[sam2]", "data.actions={none: 1}", "encoder.sam2.options.level=7")


def test_a_condition_that_begins_small_adds_little_and_changes_nothing_else(make_parts):
    usual, small = (make_parts("encoder=[dino]", f"model.condition_init={factor}").model for factor in (1.0, 0.125))
    for (name, whole), part in zip(usual.state_dict().items(), small.state_dict().values(), strict=True):
        assert torch.equal(whole * 0.125 if "linear_condition" in name else whole, part)
