"""Samples a second and days of a run, from FLOPs and assumptions about the GPUs."""

from dataclasses import dataclass

from vpt.distributed.strategy import fits_replicated
from vpt.errors import ConfigError
from vpt.estimate.settings import EstimateConfig
from vpt.estimate.sharding import ShardingPlan
from vpt.flops.hardware import GPUS
from vpt.models.vpt import VPTModel

SECONDS_A_DAY = 86_400
GIGA, TERA = 1e9, 1e12


@dataclass(frozen=True)
class Throughput:
    """Assumptions about the GPUs, and the speed that follows from them.

        samples a second = GPUs * peak * utilisation / FLOPs of a sample

    The utilisation is of everything that is computed, recomputation included, and stands for all that the formula does
    not know: kernels that wait for memory, gradients that wait for the network, GPUs that wait for data.

    Attributes:
        gpus: how many.
        peak: FLOP/s of one.
        utilisation: share of the peak.
        flops: of a sample, forward, backward and recomputed.
        tokens: of a sample.
    """

    gpus: int
    peak: float
    utilisation: float
    flops: float
    tokens: float

    @property
    def samples_a_second(self) -> float:
        """Samples a second of all GPUs together."""
        return self.gpus * self.peak * self.utilisation / self.flops

    @property
    def tokens_a_second(self) -> float:
        """Tokens a second of all GPUs together."""
        return self.samples_a_second * self.tokens

    def days(self, samples: float) -> float:
        """To train on so many samples."""
        return samples / self.samples_a_second / SECONDS_A_DAY


def throughput(config: EstimateConfig, *, flops: float, tokens: float) -> Throughput:
    """The pace of a configuration."""
    assumed = config.assume
    peak = assumed.peak_tflops or GPUS[assumed.gpu][1][config.training.precision]
    return Throughput(config.gpus, peak * TERA, assumed.utilisation, flops, tokens)


def memory_of_a_gpu(config: EstimateConfig) -> float:
    """Bytes."""
    return GPUS[config.assume.gpu][0] * GIGA


def sharding_plan(config: EstimateConfig, model: VPTModel) -> ShardingPlan:
    """The sharding that a configuration asks for. Raises ConfigError where the strategy does not fit them."""
    strategy, gpus = config.strategy, config.gpus
    kind = strategy.kind
    if kind == "auto":
        kind = "single" if gpus == 1 else "ddp" if fits_replicated(model, memory_of_a_gpu(config)) else "fsdp"
    if kind == "single" and gpus > 1:
        raise ConfigError(f"strategy=single is for one process; type strategy=ddp or fsdp for gpus={gpus}")
    group = strategy.shard_size or min(gpus, config.assume.gpus_per_node)
    if kind == "hybrid" and gpus % group:
        raise ConfigError(f"gpus={gpus} do not make groups of {group}; set strategy.shard_size")
    return ShardingPlan(gpus, kind, {"fsdp": gpus, "hybrid": group}.get(kind, 1), strategy.reshard_after_forward)


def micro_batch(config: EstimateConfig) -> int:
    """Rows that one GPU runs at once."""
    return max(1, min(config.training.micro_batch_size, config.training.batch_size // config.gpus))
