"""Whole tensors and their shards."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def full_tensor(tensor: Tensor) -> Tensor:
    """The whole of a tensor that may be sharded. A collective where it is."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def shard_like(tensor: Tensor, own: Tensor) -> Tensor:
    """A whole tensor as `own` is: this process's slice of it where `own` is sharded. No collective."""
    if not isinstance(own, DTensor):
        return tensor
    return distribute_tensor(tensor, own.device_mesh, own.placements, src_data_rank=None)
