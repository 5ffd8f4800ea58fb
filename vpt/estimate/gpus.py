"""The GPUs of a run: how they share the model, and the speed that follows from what is assumed about them."""

from dataclasses import dataclass

from vpt.distributed.strategy import fits_replicated
from vpt.errors import ConfigError
from vpt.estimate.settings import EstimateConfig
from vpt.flops.hardware import GPUS
from vpt.models.vpt import VPTModel

FLOAT32 = 4
GIGA = 1e9


@dataclass(frozen=True)
class ShardingPlan:
    """Sharding of a model among processes, one for each GPU (`vpt.distributed.strategy`).

    Attributes:
        gpus: how many.
        kind: `single`, `ddp`, `fsdp` or `hybrid`.
        shards: how many of them hold one copy of the weights together.
        reshard: whether a unit's weights are given back after its forward pass.
        offload: whether shards, their gradients and moments are in the CPU's memory.
    """

    gpus: int = 1
    kind: str = "single"
    shards: int = 1
    reshard: bool = True
    offload: bool = False

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered in units, as products need them."""
        return self.kind in ("fsdp", "hybrid")


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
    return ShardingPlan(
        gpus, kind, {"fsdp": gpus, "hybrid": group}.get(kind, 1), strategy.reshard_after_forward, strategy.cpu_offload
    )


def communication_bytes(model: VPTModel, plan: ShardingPlan, *, product: int, kept: float) -> float:
    """Bytes of a process's buffers for the others.

    `ddp` has buckets as large as the gradients. `fsdp` and `hybrid` have gathered weights (two decoder layers, one at
    work and one on its way, or a tower, which runs before anything is kept; all of them without `reshard`), what is in
    no unit, whole, with its gradients, and the gradients of one unit on their way back, as computed and in float32.

    Args:
        product: bytes of a number in products, which units are gathered as.
        kept: bytes of activations, which are not there yet while towers run.
    """
    if plan.kind == "ddp":
        return float(sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad))
    if not plan.sharded:
        return 0.0
    units = model.shard_units
    sizes = [product * sum(p.numel() for p in unit.parameters()) for unit in units]
    layers = len(model.language.layers)  # which come first
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    leaving = max(sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units)
    at_once = max(sum(sorted(sizes[:layers])[-2:]), max(sizes[layers:]) - kept)
    gathered = at_once if plan.reshard else sum(sizes)
    return gathered + sum(p.nbytes * (1 + p.requires_grad) for p in rest) + leaving * (product + FLOAT32)


def memory_of_a_gpu(config: EstimateConfig) -> float:
    """Bytes of memory of one assumed GPU."""
    return GPUS[config.assume.gpu][0] * GIGA


def micro_batch(config: EstimateConfig) -> int:
    """Rows that one GPU runs at once."""
    return max(1, min(config.training.micro_batch_size, config.training.batch_size // config.gpus))


def peak_flops(config: EstimateConfig) -> float:
    """FLOP/s of one GPU."""
    return 1e12 * (config.assume.peak_tflops or GPUS[config.assume.gpu][1][config.training.precision])


def samples_per_second(config: EstimateConfig, flops: float) -> float:
    """Samples of `flops` FLOPs that all GPUs together run in a second: GPUs * peak * utilisation / FLOPs.

    FLOPs are those of everything that is computed, recomputation included. The utilisation stands for all that the
    formula does not know: kernels that wait for memory, gradients that wait for the network, GPUs that wait for data.
    """
    return config.gpus * peak_flops(config) * config.assume.utilisation / flops
