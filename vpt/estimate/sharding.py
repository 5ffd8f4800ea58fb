"""Sharding of a model among processes (`vpt.distributed.strategy`), and the memory of its communication buffers."""

from dataclasses import dataclass

from vpt.models.vpt import VPTModel

FLOAT32 = 4


@dataclass(frozen=True)
class ShardingPlan:
    """Processes, one for each GPU.

    Attributes:
        gpus: how many.
        kind: `single`, `ddp`, `fsdp` or `hybrid`.
        shards: how many of them hold one copy of the weights together.
        reshard: whether a unit's weights are given back after its forward pass.
    """

    gpus: int = 1
    kind: str = "single"
    shards: int = 1
    reshard: bool = True

    @property
    def sharded(self) -> bool:
        """Whether weights are gathered in units, as products need them."""
        return self.kind in ("fsdp", "hybrid")


def communication_bytes(model: VPTModel, spread: ShardingPlan, *, product: int) -> float:
    """Bytes of a process's buffers for the others.

    `ddp` has buckets as large as the gradients. `fsdp` and `hybrid` have gathered weights (two units, one at work and
    one on its way; all of them without `reshard`), what is in no unit, whole, with its gradients, and the gradients of
    one unit on their way back, as they are computed and in float32.

    Args:
        model: on any device.
        spread: the processes.
        product: bytes of a number in products, which is what units are gathered as.
    """
    if spread.kind == "ddp":
        return float(sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad))
    if not spread.sharded:
        return 0.0
    units = model.shard_units
    sizes = sorted((sum(p.numel() for p in unit.parameters()) for unit in units), reverse=True)
    inside = {id(parameter) for unit in units for parameter in unit.parameters()}
    rest = [parameter for parameter in model.parameters() if id(parameter) not in inside]
    leaving = max(sum(p.numel() for p in unit.parameters() if p.requires_grad) for unit in units)
    gathered = sum(sizes[:2] if spread.reshard else sizes) * product
    return gathered + sum(p.nbytes * (1 + p.requires_grad) for p in rest) + leaving * (product + FLOAT32)
