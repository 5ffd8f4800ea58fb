"""Losses and gradients of a batch, and whether two routes to them agree."""

from dataclasses import replace

import torch

# Wider weights let (f . c) c amplify float32's rounding through three actions in a row.
MODEST = ("model.config.initializer_range=0.04", "model.config.vision_config.initializer_range=0.04")


def as_double(batch):
    """A batch with its images in float64, for a model in float64: float32 rounds otherwise on every processor."""
    images = {name: replace(one, pixels=one.pixels.double()) for name, one in batch.images.items()}
    return replace(batch, images=images)


def losses_and_gradients(parts, batch, inner_forward, **changes):
    model = parts.model
    model.forward_config = replace(model.forward_config, inner_forward=inner_forward, **changes)
    model.zero_grad()
    out = model(batch)
    (out.loss_sum / batch.num_labels).backward()
    return out, {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def assert_same(left, right, *, loss=1e-6, gradients=1e-5, rounding=1e-8):
    """`rounding`: the gradient of a key's bias is zero but for rounding; it has no scale to be relative to."""
    (a, gradients_a), (b, gradients_b) = left, right
    assert torch.equal(a.targets, b.targets)
    torch.testing.assert_close(a.loss_sum, b.loss_sum, rtol=loss, atol=0)
    assert gradients_a.keys() == gradients_b.keys()
    for name, gradient in gradients_a.items():
        scale = gradients_b[name].abs().max()
        assert (gradient - gradients_b[name]).abs().max() <= gradients * scale + rounding, name
