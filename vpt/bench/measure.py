"""Figures: ratios of sides measured in turn, a table, a file."""

import json
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vpt.models.vpt import InnerForwardConfig, VPTModel
from vpt.perception.batch import Batch

ROUNDS = 5
Timed = Callable[[], object]


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `better` says on which side of `bound` the value should lie: `lower` or `higher`."""

    name: str
    value: float
    bound: float
    better: str = "lower"

    @property
    def ok(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound

    def __str__(self) -> str:
        sign = "≤" if self.better == "lower" else "≥"
        return f"{self.name:28}{self.value:10.3f}   {sign} {self.bound:<6g} {'ok' if self.ok else 'NOT KEPT'}"

    def as_json(self) -> dict[str, object]:
        """The figure as `bench.json` holds it."""
        return asdict(self) | {"ok": self.ok}


def worst_of(name: str, parts: Mapping[str, float], *, bound: float, better: str = "lower") -> list[Measurement]:
    """A figure of several parts, and the parts."""
    value = max(parts.values()) if better == "lower" else min(parts.values())
    named = {name: value, **{f"{name}.{part}": value for part, value in parts.items()}}
    return [Measurement(part, value, bound, better) for part, value in named.items()]


def time_in_turns(sides: Mapping[str, Timed], *, rounds: int | None = None) -> dict[str, list[float]]:
    """Seconds of each side in each round (`ROUNDS` of them), the sides in turn.

    One unmeasured call of the first one wakes the threads; what the others do for the first time, medians leave out.
    """
    next(iter(sides.values()))()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    for _ in range(rounds or ROUNDS):
        for name, side in sides.items():
            taken[name].append(timed(side))
    return taken


def timed(side: Timed) -> float:
    """Seconds that one call takes, the GPU's work included."""
    wait()
    started = time.perf_counter()
    side()
    wait()
    return time.perf_counter() - started


def wait() -> None:
    """Until a GPU has done all that it was given."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def median_ratio(first: Iterable[float], second: Iterable[float]) -> float:
    """Median over rounds of first / second."""
    return statistics.median(a / b for a, b in zip(first, second, strict=True))


def ratio(first: Timed, second: Timed) -> float:
    """Median over rounds of time(first) / time(second), the two in turn."""
    return median_ratio(*time_in_turns({"first": first, "second": second}).values())


def training_step(model: VPTModel, loss: Batch | Callable[[], Tensor], **passes: object) -> Timed:
    """Forward and backward of a batch, or of a loss; `passes` are settings of the inner forward."""
    config = InnerForwardConfig(**passes)  # type: ignore[arg-type]

    def run() -> None:
        model.forward_config = config
        model.zero_grad(set_to_none=True)
        (model(loss).loss_sum if isinstance(loss, Batch) else loss()).backward()

    return run


def write(figures: list[Measurement], path: Path) -> None:
    """Write the figures as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps([figure.as_json() for figure in figures], indent=1) + "\n")
