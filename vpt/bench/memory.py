"""Peak memory of a call, and the memory and time of activation checkpointing."""

from itertools import accumulate

import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

from vpt.bench.measure import Measurement, Timed, ratio, training_step
from vpt.bench.models import SMALL
from vpt.data.synthetic import synthetic_batch

ROWS = 4  # with fewer, the gradients are most of it


def peak_bytes(model: nn.Module, side: Timed) -> int:
    """The most that is allocated at once during a call, beyond what was before it, gradients apart.

    On a CPU as torch's profiler counts every allocation, so that what an allocator keeps for later does not matter.
    """
    model.zero_grad(set_to_none=True)  # else the call begins with freeing what another one has left
    if next(model.parameters()).is_cuda:
        before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        side()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        side()
    events = [e for e in profiler.profiler.kineto_results.events() if e.name() == "[memory]"]  # type: ignore[union-attr]
    changes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(accumulate(changes, initial=0))


def measure() -> list[Measurement]:
    """A step that recomputes the activations of its decoder layers / one that keeps them: time, and memory."""
    bundle = SMALL.build()

    def sides(rows: int) -> list[Timed]:
        batch = synthetic_batch(bundle.processor, [SMALL.row] * rows)
        return [training_step(bundle.model, batch, checkpointing=choice) for choice in (True, False)]

    recomputed, kept = (peak_bytes(bundle.model, side) for side in sides(ROWS))
    return [
        Measurement("checkpointing_time", ratio(*sides(1)), 1.4),  # one more forward pass: 4/3
        Measurement("checkpointing_memory", recomputed / kept, 0.8),
    ]
