"""The keys of `python -m vpt.describe` besides those of `train.py`: what is assumed, and can be set."""

from dataclasses import dataclass, field

from vpt.config import TrainConfig, bounded, choice

# memory (10^9 bytes), and the published dense peak (10^12 FLOP/s) by the precision of the products
GPUS: dict[str, tuple[float, dict[str, float]]] = {
    "a100": (80, {"bf16": 312, "fp32": 19.5}),
    "h100": (80, {"bf16": 989, "fp32": 67}),
    "h200": (141, {"bf16": 989, "fp32": 67}),
}


@dataclass
class AssumedConfig:
    """`describe.*`"""

    image: list[int] = field(default_factory=list)  # width, height; empty: data.image.max_side at 4:3
    crop: float = bounded(0.5, low=0.01, high=1.0)  # sides of a selected region, as a share of the image's
    question: int = bounded(40, low=1)  # tokens
    answer: int = bounded(30, low=1)  # tokens
    actions: dict[str, float] = field(default_factory=dict)  # share of each kind of sample; empty: data.actions
    gpu: str = choice("a100", "h100", "h200")
    gpus_per_node: int = bounded(8, low=1)
    peak_tflops: float | None = None  # null: the GPU's published peak
    utilisation: float = bounded(0.4, low=0.001, high=1.0)  # share of the peak that is reached
    records: list[int] = field(default_factory=lambda: [829_000, 1_000_000_000])


@dataclass
class EstimateConfig(TrainConfig):
    """A run, where it is to run, and what is assumed about its data and its GPUs."""

    gpus: int = bounded(1, low=1)
    describe: AssumedConfig = field(default_factory=AssumedConfig)
