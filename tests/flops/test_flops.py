"""FLOPs by formula against torch's own counter, and pairs against the masks of attention."""

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from conftest import ALL, FAMILIES, action_turns, conversation, samples_of
from vpt.config.schema import OptimConfig
from vpt.data.collate import collate
from vpt.flops import FlopCost, FlopMeter
from vpt.flops.cost import DecoderCost
from vpt.flops.meter import count_pairs
from vpt.flops.vision import split_counts
from vpt.models.inner_forward import InnerForwardConfig
from vpt.perception.masking import Masking
from vpt.training.optimizer import set_trainable

FORWARDS = {
    "plain": {"num_inner_forward_run": 1},
    "shared": {},
    "full": {"inner_forward": "full"},
    "zero": {"mask_mode": "zero"},
    "zero full": {"mask_mode": "zero", "inner_forward": "full"},
    "bottleneck": {"mask_mode": "bottleneck"},
    "three control tokens": {"projector_scale": 3},
    "checkpointing": {"checkpointing": True},
}
TRAINED = {
    "everything": OptimConfig(),
    "no tower": OptimConfig(freeze=["qwen.model.visual.*", "encoders.*.vision.*"]),
    "projectors": OptimConfig(freeze=["*"], unfreeze=["*.projector.*"]),
    "condition": OptimConfig(freeze=["*"], unfreeze=["*.projector.*_condition.*"]),
}


def record():
    """A look at the image, two at what DINOv2 and SAM see of another one."""
    return conversation(
        "3.png", action_turns("detection"), action_turns("seg"), answer="brown", detection_images=["1.png"],
        seg_images=["3.png"],
    )  # fmt: skip


def one_row(parts, folder, *, masked):
    """A batch of one row."""
    [sample] = samples_of(parts, folder, [record()])
    return collate([sample], masked=[Masking(1, 1.0).spans(sample.row) if masked else ()])


def counted(model, batch) -> tuple[int, int, int]:
    """Forward through matrices and through attention, and backward, as torch counts them."""
    with sdpa_kernel(SDPBackend.MATH):
        with FlopCounterMode(display=False) as forward:
            loss = model(batch).loss_sum
        with FlopCounterMode(display=False) as backward:
            loss.backward()
    return *split_counts(forward), backward.get_total_flops()


def total(costs: dict[str, FlopCost]) -> FlopCost:
    return sum(costs.values(), FlopCost())


@pytest.fixture(scope="module")
def parts_of(make_parts):
    """Tiny parts by family and number of control tokens, made once; a test sets `passes` and what is trained."""
    return cache(
        lambda family="qwen2_vl", scale=1: make_parts(*ALL, *FAMILIES[family], f"model.projector_scale={scale}")
    )


@pytest.fixture(autouse=True)
def _nothing_is_padded(monkeypatch):
    """Every segment attends in a call of its own: padding is computed, but no formula counts it."""
    monkeypatch.setattr(
        "vpt.models.attention.bucket_by_size", lambda lengths, counts: [[i] for i in range(len(lengths))]
    )


@pytest.mark.parametrize("forward", FORWARDS)
def test_formula_equals_the_counter(parts_of, folder, forward):
    parts = parts_of(scale=FORWARDS[forward].get("projector_scale", 1))
    model = parts.model
    model.forward_config = InnerForwardConfig(**FORWARDS[forward])
    set_trainable(model, TRAINED["no tower"], tower_pretrained=False)
    batch = one_row(parts, folder, masked=forward.startswith(("zero", "bottleneck")))
    cost = total(FlopMeter(model, pairs="dense").step(batch))
    assert (cost.linear, cost.attention, cost.backward + cost.recomputed) == counted(model, batch)


@pytest.mark.parametrize(
    ("family", "trained"),
    [*(("qwen2_vl", trained) for trained in TRAINED), ("qwen2_5_vl", "everything"), ("qwen3_vl", "everything")],
)
def test_what_is_frozen_runs_forward_only(parts_of, folder, family, trained):
    parts = parts_of(family)
    parts.model.forward_config = InnerForwardConfig()
    set_trainable(parts.model, TRAINED[trained], tower_pretrained=False)
    batch = one_row(parts, folder, masked=False)
    cost = total(FlopMeter(parts.model, pairs="dense").step(batch))
    assert (cost.linear, cost.attention, cost.backward) == counted(parts.model, batch)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_adapters_are_counted(make_parts, folder, checkpointing):
    pytest.importorskip("peft")
    parts = make_parts(*ALL, "model.lora.rank=4")
    parts.model.forward_config = InnerForwardConfig(checkpointing=checkpointing)
    set_trainable(parts.model, OptimConfig(), tower_pretrained=True)
    batch = one_row(parts, folder, masked=False)
    cost = total(FlopMeter(parts.model, pairs="dense").step(batch))
    assert (cost.linear, cost.attention, cost.backward + cost.recomputed) == counted(parts.model, batch)


@pytest.mark.parametrize("mode", ["shared", "full"])
@pytest.mark.parametrize("mask", ["off", "zero", "bottleneck"])
def test_pairs_are_those_that_the_mask_lets_through(parts_of, folder, mode, mask):
    parts = parts_of()
    model = parts.model
    model.forward_config = InnerForwardConfig(
        inner_forward=mode, mask_mode="bottleneck" if mask == "bottleneck" else "zero"
    )
    batch = one_row(parts, folder, masked=mask != "off")
    [segments] = model.split_segments(batch.rows)
    groups = [group for stage in model.plan_forward(batch).stages for group in stage.layout.groups]
    for segment, group in zip(segments, groups, strict=True):
        _, length, keys = group.shape
        unmasked = keys if length == 1 else length * (length + 1) // 2  # one query sees all keys
        assert count_pairs(segment) == (unmasked if group.mask is None else group.mask.sum())


def test_what_is_known_is_not_seen_again(parts_of, folder):
    parts = parts_of()
    model = parts.model
    model.forward_config = InnerForwardConfig()
    set_trainable(model, TRAINED["no tower"], tower_pretrained=True)
    batch = one_row(parts, folder, masked=False)
    meter = FlopMeter(model, pairs="dense")
    before = meter.step(batch)
    with torch.no_grad():
        seen = model.encode_images(batch.images)
    batch.images = {
        view: replace(images, pixels=torch.empty(0), grids=[], cached=dict(enumerate(images.split(seen[view]))))
        for view, images in batch.images.items()
    }
    after = meter.step(batch)
    assert {part for part in after if after[part] != before[part]} == {
        "qwen.model.visual", "encoders.dino.vision", "encoders.sam.vision",
    }  # fmt: skip
    cost = total(after)
    assert (cost.linear, cost.attention, cost.backward) == counted(model, batch)


def test_two_passes_cost_what_one_costs(parts_of, folder):
    """With a shared prefix; whole passes cost one more for each of the two actions.

    But for the last MLP: it sees each control state that is read, and the labels in the last pass only.
    """
    parts = parts_of()
    set_trainable(parts.model, OptimConfig(), tower_pretrained=True)
    batch = one_row(parts, folder, masked=False)
    meter, language = FlopMeter(parts.model), {}
    for forward in ("plain", "shared", "full"):
        parts.model.forward_config = InnerForwardConfig(**FORWARDS[forward])
        language[forward] = meter.step(batch)["qwen.model.language_model"]
    states = DecoderCost(parts.model.language.layers, carries=True).cost(0, 2, 0, again=False)
    labels = DecoderCost(parts.model.language.layers, carries=True).cost(0, batch.num_labels, 0, again=False)
    assert language["shared"] == language["plain"] + states
    assert language["full"] + labels * 2 == language["plain"] * 3 + states


def test_rows_of_a_batch_add_up(parts_of, folder):
    parts = parts_of()
    parts.model.forward_config = InnerForwardConfig()
    set_trainable(parts.model, OptimConfig(), tower_pretrained=True)
    samples = samples_of(parts, folder)
    meter = FlopMeter(parts.model)
    together = meter.step(collate(samples))
    alone = [meter.step(collate([sample])) for sample in samples]
    for part, cost in together.items():
        apart = sum((costs[part] for costs in alone), FlopCost())
        if part in ("qwen.model.visual", "encoders.dino.vision"):
            assert 0 < cost.total < apart.total  # equal images are seen once
        elif part.startswith("qwen"):
            assert cost == apart


def test_counting_changes_nothing(parts_of):
    model = parts_of().model
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    model.zero_grad()
    FlopMeter(model)
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())
    assert all(parameter.grad is None for parameter in model.parameters())
