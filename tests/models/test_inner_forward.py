"""`shared` equals `full`: two routes to one answer, on batches that mix everything."""

from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch

from conftest import ALL, FAMILIES, action_turns, conversation, samples_of
from helpers.gradients import MODEST, assert_same, losses_and_gradients
from vpt.data.collate import collate
from vpt.models.inner_forward import StagedKVCache
from vpt.models.output import compute_outputs
from vpt.perception.masking import Masking

CASES = [
    *(("qwen2_vl", scale, mask) for scale in (1, 3) for mask in ("off", "zero", "bottleneck")), ("qwen2_vl", 2, "zero"),
    *(pytest.param("qwen2_vl", 2, mask, marks=pytest.mark.slow) for mask in ("off", "bottleneck")),
    ("qwen2_5_vl", 1, "off"), ("qwen2_5_vl", 2, "zero"), ("qwen2_5_vl", 3, "bottleneck"),
    ("qwen3_vl", 1, "off"), ("qwen3_vl", 1, "zero"), ("qwen3_vl", 2, "zero"), ("qwen3_vl", 2, "bottleneck"),
]  # fmt: skip


@pytest.mark.parametrize(("family", "scale", "mask"), CASES)
def test_shared_equals_full(make_parts, folder, family, scale, mask):
    parts = make_parts(*ALL, *FAMILIES[family], f"model.projector_scale={scale}", *MODEST)
    samples = samples_of(parts, folder)
    masking = Masking(2 if mask == "zero" else 1, 1.0)
    # every second row is masked, so that masked and other rows share a batch
    masked = [masking.spans(s.row) if mask != "off" and i % 2 == 0 else () for i, s in enumerate(samples)]
    batch = collate(samples, masked=masked)
    mode = "bottleneck" if mask == "bottleneck" else "zero"
    full = losses_and_gradients(parts, batch, "full", mask_mode=mode)
    shared = losses_and_gradients(parts, batch, "shared", mask_mode=mode)
    assert_same(shared, full)


@pytest.mark.parametrize("scale", [1, 2])
def test_packed_equals_row_by_row(make_parts, folder, scale):
    parts = make_parts(*ALL, f"model.projector_scale={scale}")
    samples = samples_of(parts, folder)
    packed = parts.model(collate(samples)).nll
    alone = torch.cat([parts.model(collate([sample])).nll for sample in samples])
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=2e-6)


def test_order_and_grouping_of_rows_change_nothing(make_parts, folder):
    parts = make_parts(*ALL)
    samples = samples_of(parts, folder)
    forward = parts.model(collate(samples))
    backward = parts.model(collate(samples[::-1]))
    counts = [sum(int(label != -100) for label in sample.labels[1:]) for sample in samples]
    pieces = backward.nll.split(counts[::-1])[::-1]
    torch.testing.assert_close(forward.nll, torch.cat(pieces), rtol=1e-5, atol=2e-6)


@pytest.mark.parametrize("inner_forward", ["shared", "full"])
@pytest.mark.parametrize("mask", ["off", "zero", "bottleneck"])
def test_checkpointing_changes_nothing(make_parts, folder, inner_forward, mask):
    """To the last bit: a recomputed layer finds the keys that it found the first time."""
    parts = make_parts(*ALL)
    samples = samples_of(parts, folder)
    batch = collate(samples, masked=[Masking(1, 1.0).spans(s.row) if mask != "off" else () for s in samples])
    mode = "bottleneck" if mask == "bottleneck" else "zero"
    kept = losses_and_gradients(parts, batch, inner_forward, mask_mode=mode, checkpointing=False)
    recomputed = losses_and_gradients(parts, batch, inner_forward, mask_mode=mode, checkpointing=True)
    assert_same(recomputed, kept, loss=0, gradients=0, rounding=0)


def test_one_pass_conditions_nothing(make_parts, folder):
    """The alignment stage: no control state reaches the projector's condition."""
    parts = make_parts(*ALL)
    batch = collate(samples_of(parts, folder))
    _, gradients = losses_and_gradients(parts, batch, "shared", num_inner_forward_run=1)
    assert not any("condition" in name for name in gradients)
    assert any("linear_feature" in name for name in gradients)


def test_the_control_state_steers_the_answer(make_parts, folder):
    """With two passes the question reaches the re-encoded tokens; with one it does not."""
    parts = make_parts(*ALL)
    batch = collate(samples_of(parts, folder))
    _, gradients = losses_and_gradients(parts, batch, "shared", num_inner_forward_run=2)
    for name in ("dino", "sam", "clip"):
        assert gradients[f"encoders.{name}.projector.linear_condition.weight"].abs().max() > 0


@pytest.mark.parametrize("mode", ["zero", "bottleneck"])
def test_a_masked_answer_sees_the_image_through_the_control_state_alone(make_parts, folder, mode):
    parts = make_parts("encoder=[dino]")
    model = parts.model
    model.forward_config = replace(model.forward_config, mask_mode=mode)
    record = conversation("2.png", action_turns("detection"), answer="teal", detection_images=["2.png"])
    [sample] = samples_of(parts, folder, [record])
    spans = Masking(1, 1.0).spans(sample.row)
    for masked in ((), spans):
        batch = collate([sample], masked=[masked])
        tokens = model.project_features(model.encode_images(batch.images), batch)
        tokens["image"] = tokens["image"].detach().requires_grad_()
        plan = model.plan_forward(batch)
        with states_detached(model):
            hidden, states = model.run_stages(batch, plan, tokens, StagedKVCache())
            out = compute_outputs(
                model.logits, batch, hidden[plan.output_index][batch.loss_positions], states, keep_logits=False
            )
        gradient = torch.autograd.grad(out.nll[-1], tokens["image"], allow_unused=True)[0]
        seen = 0.0 if gradient is None else gradient.abs().max().item()
        assert (seen == 0.0) == bool(masked and mode == "zero")


@contextmanager
def states_detached(model):
    """Cut the gradient through control states, so that only attention can carry it."""
    compose = model.embed_inputs
    model.embed_inputs = lambda ids, stage, tokens, states: compose(ids, stage, tokens, states.detach())
    yield
    del model.embed_inputs


@pytest.mark.parametrize("mode", ["shared", "full"])
def test_nothing_is_computed_that_nobody_reads(make_parts, folder, mode):
    """After the last attention: each label's position once, each control state once; and the predictions are those of
    a forward that returns every position."""
    parts = make_parts(*ALL)
    model = parts.model
    model.forward_config = replace(model.forward_config, inner_forward=mode)
    batch = collate(samples_of(parts, folder))
    seen = []
    hook = model.language.layers[-1].mlp.register_forward_hook(lambda _, given, out: seen.append(given[0].shape[1]))
    out = model(batch)
    hook.remove()
    states = sum(action.count for row in batch.rows for action in row.actions)
    assert sum(seen) == batch.num_labels + states
    plan = model.plan_forward(batch)
    hidden, _ = model.run_stages(
        batch, plan, model.project_features(model.encode_images(batch.images), batch), StagedKVCache()
    )
    everywhere = compute_outputs(
        model.logits, batch, hidden[plan.output_index][batch.loss_positions], out.control_states, keep_logits=False
    )
    torch.testing.assert_close(out.nll, everywhere.nll)
