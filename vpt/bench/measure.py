"""Figures: ratios of sides measured in turn, with their intervals; a table, a file."""

import json
import math
import statistics
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from vpt.models.inner_forward import InnerForwardConfig
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch

ROUNDS, MOST_ROUNDS = 7, 25
WIDTH = 0.03  # of an interval, as a share of its ratio, from which on no more rounds are run
SECONDS = 30.0  # after which no other round begins
Timed = Callable[[], object]


@dataclass(frozen=True)
class Ratio:
    """The median over rounds of one side's time over another's, and its 95% interval."""

    value: float
    low: float
    high: float

    @classmethod
    def of(cls, first: Iterable[float], second: Iterable[float]) -> "Ratio":
        """The ratio of times that were taken in turn."""
        return cls.median(a / b for a, b in zip(first, second, strict=True))

    @classmethod
    def median(cls, values: Iterable[float]) -> "Ratio":
        """The median and its interval between order statistics, which takes nothing for granted: of n values, as many
        are left out on each side as half of 2^-n times the ways to choose so few allows (none below six)."""
        ordered = sorted(values)
        count, below, out = len(ordered), 0.0, 0
        while (below := below + math.comb(count, out) / 2**count) <= 0.025:
            out += 1
        out = max(out - 1, 0)
        return cls(statistics.median(ordered), ordered[out], ordered[-1 - out])

    def __mul__(self, factor: float) -> "Ratio":
        return Ratio(self.value * factor, self.low * factor, self.high * factor)

    @property
    def narrow(self) -> bool:
        """Whether more rounds would say little more."""
        return self.high - self.low <= WIDTH * self.value


@dataclass(frozen=True)
class Measurement:
    """One line of the table. `better` says on which side of `bound` the value, and its interval, should lie: `lower` or
    `higher`."""

    name: str
    value: float | Ratio
    bound: float
    better: str = "lower"

    @property
    def ends(self) -> Ratio:
        """The value with its interval, which is nothing wide where there is one value alone."""
        return self.value if isinstance(self.value, Ratio) else Ratio(self.value, self.value, self.value)

    @property
    def ok(self) -> bool:
        """Whether the bound is kept by the whole interval."""
        return self.ends.high <= self.bound if self.better == "lower" else self.ends.low >= self.bound

    def __str__(self) -> str:
        ends, sign = self.ends, "≤" if self.better == "lower" else "≥"
        interval = f"[{ends.low:.3f}, {ends.high:.3f}]" if isinstance(self.value, Ratio) else ""
        return (
            f"{self.name:28}{ends.value:8.3f} {interval:16} {sign} {self.bound:<6.3g} {'ok' if self.ok else 'NOT KEPT'}"
        )

    def as_json(self) -> dict[str, object]:
        """The figure as `bench.json` holds it; `low` and `high` are null where it is no ratio of times."""
        found = (
            asdict(self.value) if isinstance(self.value, Ratio) else {"value": self.value, "low": None, "high": None}
        )
        return {"name": self.name, **found, "bound": self.bound, "better": self.better, "ok": self.ok}


def worst_of(name: str, parts: Mapping[str, Ratio], *, bound: float, better: str = "lower") -> list[Measurement]:
    """A figure of several parts, and the parts."""
    worst = (max if better == "lower" else min)(parts.values(), key=lambda ratio: ratio.value)
    named = {name: worst, **{f"{name}.{part}": value for part, value in parts.items()}}
    return [Measurement(part, value, bound, better) for part, value in named.items()]


def time_in_turns(sides: Mapping[str, Timed], *, rounds: int | None = None) -> dict[str, list[float]]:
    """Seconds of each side in each round, the sides in turn.

    `rounds` of them, or until each side's ratio to the first one is known closely (`WIDTH`), within bounds. One
    unmeasured call of each side comes before.
    """
    for side in sides.values():
        side()
    taken: dict[str, list[float]] = {name: [] for name in sides}
    first, started = next(iter(taken.values())), time.perf_counter()
    while len(first) < (rounds or ROUNDS) or (
        rounds is None and len(first) < MOST_ROUNDS and time.perf_counter() - started < SECONDS
        and not all(Ratio.of(times, first).narrow for times in taken.values())
    ):  # fmt: skip
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


def ratio(first: Timed, second: Timed) -> Ratio:
    """time(first) / time(second), the two in turn."""
    return Ratio.of(*time_in_turns({"first": first, "second": second}).values())


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
