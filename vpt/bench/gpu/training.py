"""Steps of training: as the loop takes them, on random rows."""

import statistics
from dataclasses import dataclass, replace

import torch

from vpt.bench.measure import timed
from vpt.bench.models import BenchModel
from vpt.config.schema import LoraConfig, StrategyConfig
from vpt.data.synthetic import synthetic_batch
from vpt.distributed.process_group import World
from vpt.distributed.strategy import build_strategy, choose_strategy
from vpt.flops import FlopMeter
from vpt.flops.hardware import peak_flops
from vpt.models.inner_forward import compile_layers
from vpt.perception.batch import Batch


@dataclass(frozen=True)
class StepTiming:
    """Time, tokens, FLOPs and memory of a step of one process.

    Attributes:
        rows: of a micro-batch, which is a step's.
        checkpointing: whether decoder layers are run again in the backward pass.
        compiled: whether decoder layers went through torch.compile.
        seconds: of a step.
        tokens: of a step.
        flops: of a step, by formula, without what is computed again.
        peak: FLOP/s that the device could reach.
        memory: bytes at the peak, all states included.
    """

    rows: int
    checkpointing: bool
    compiled: bool
    seconds: float
    tokens: int
    flops: float
    peak: float
    memory: int

    @property
    def samples_a_second(self) -> float:
        return self.rows / self.seconds

    @property
    def utilisation(self) -> float:
        """The share of the device's peak."""
        return self.flops / self.seconds / self.peak

    def __str__(self) -> str:
        how = ", recomputing" * self.checkpointing + ", compiled" * self.compiled
        return (
            f"{self.rows} rows{how}: {self.seconds * 1e3:.0f} ms, {self.samples_a_second:.1f} samples/s, "
            f"{self.tokens / self.seconds:,.0f} tokens/s, {self.flops / self.seconds / 1e12:.0f} TFLOP/s = "
            f"{self.utilisation:.1%} of the peak, {self.memory / 2**30:.1f} GiB"
        )


class Training:
    """A model with its optimizer, whose states exist from the first step on."""

    def __init__(
        self, sizes: BenchModel, world: World, device: torch.device, *, compiled: bool, lora: LoraConfig | None
    ) -> None:
        """Args:
        sizes: of the model, which is trained whole, or by adapters where `lora` is given.
        world: the processes; several of them share a model as `strategy=auto` would.
        device: of this process.
        compiled: whether decoder layers go through torch.compile.
        """
        self.sizes, self.device, self.compiled = sizes, device, compiled
        self.bundle = sizes.build(device, lora=lora)
        model = self.model = self.bundle.model
        self.meter = FlopMeter(model)  # before anything is sharded
        if compiled:
            compile_layers(model.language.layers)
        strategy = StrategyConfig(kind=choose_strategy(model, world, device))
        self.strategy = build_strategy(strategy, model, world, device, precision="bf16")
        self.peak = peak_flops(device, precision="bf16")
        self.trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        self.optimizer = torch.optim.AdamW(self.trained, lr=1e-6, fused=True)

    def batch(self, rows: int) -> Batch:
        """A synthetic batch of that many rows, on the device."""
        return synthetic_batch(self.bundle.processor, [self.sizes.row] * rows).to(self.device)

    def step(self, batch: Batch) -> None:
        """Forward, backward, clip, update."""
        with self.strategy.grad_sync(last=True):
            with torch.autocast(self.device.type, dtype=torch.bfloat16):  # `training.precision=bf16`
                loss = self.strategy(batch).loss_sum / batch.num_labels
            loss.backward()
        torch.nn.utils.clip_grad_norm_(self.trained, 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def set(self, *, checkpointing: bool) -> None:
        """Whether decoder layers are run again in the backward pass."""
        self.model.forward_config = replace(self.model.forward_config, checkpointing=checkpointing)

    def measure(self, rows: int, *, checkpointing: bool, warm_up: int, steps: int) -> StepTiming | None:
        """Time (the median of `steps`) and memory of a step; None where memory does not suffice."""
        self.set(checkpointing=checkpointing)
        cuda = self.device.type == "cuda"
        try:
            batch = self.batch(rows)
            if cuda:
                torch.cuda.reset_peak_memory_stats()
            taken = [timed(lambda: self.step(batch)) for _ in range(warm_up + steps)][warm_up:]
        except torch.OutOfMemoryError:
            self.optimizer.zero_grad(set_to_none=True)
            torch.cuda.empty_cache()
            return None
        flops = sum(cost.useful for cost in self.meter.step(batch).values())
        return StepTiming(
            rows, checkpointing, self.compiled, statistics.median(taken), len(batch.input_ids), flops, self.peak,
            torch.cuda.max_memory_allocated() if cuda else 0,
        )  # fmt: skip
