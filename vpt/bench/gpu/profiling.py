"""Share of a step's time by kind of kernel."""

import re
from collections import defaultdict
from pathlib import Path

from torch.profiler import ProfilerActivity, profile

from vpt.bench.gpu.training import Training
from vpt.bench.measure import wait
from vpt.perception.batch import Batch

# The first pattern that a kernel's (on a CPU: an operation's) name matches says what it is.
KINDS = {
    "attention": r"flash|fmha|attention|varlen",
    "matrix products": r"gemm|cutlass|nvjet|xmma|matmul|::mm|addmm|bmm|convolution|conv2d|cudnn",
    "communication": r"nccl|c10d|gloo",
    "optimizer": r"adam|multi_tensor|foreach|lpnorm",
    "copies and casts": r"memcpy|memset|copy|cat|index|gather|scatter|fill",
    "normalisation, softmax, loss": r"norm|softmax|nll|cross_entropy|reduce",
    "elementwise": r"elementwise|mul|add|silu|gelu|sigmoid|vectorized",
}
STEPS = 2


def shares(training: Training, batch: Batch, table: Path) -> dict[str, float]:
    """Kind of work -> its share of a step's time; what is left is a device that waits.

    Args:
        training: at work already.
        batch: of its steps.
        table: the kernels one by one are written there.
    """
    cuda = training.device.type == "cuda"
    training.step(batch)
    wait()
    activities = [ProfilerActivity.CUDA] if cuda else [ProfilerActivity.CPU]
    with profile(activities=activities) as profiler:
        for _ in range(STEPS):
            training.step(batch)
        wait()
    averages = profiler.key_averages()
    key = "self_device_time_total" if cuda else "self_cpu_time_total"
    table.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(averages.table(sort_by=key, row_limit=40, max_name_column_width=100))
    taken: defaultdict[str, float] = defaultdict(float)
    for event in averages:
        taken[kind_of(event.key)] += getattr(event, key)
    busy = sum(taken.values())
    spans = [(event.time_range.start, event.time_range.end) for event in profiler.events() or ()]
    whole = max(end for _, end in spans) - min(start for start, _ in spans)
    return {kind: time / max(whole, busy) for kind, time in sorted(taken.items(), key=lambda item: -item[1])}


def kind_of(name: str) -> str:
    """The kind of a kernel (attention, matmul, ...), by its name."""
    found = (kind for kind, pattern in KINDS.items() if re.search(pattern, name, re.IGNORECASE))
    return next(found, "other")


def idle(parts: dict[str, float]) -> float:
    """The share of time in which nothing ran."""
    return max(0.0, 1 - sum(parts.values()))
