"""The processes of a run: their ranks, and collectives for the few things that they exchange besides gradients."""

import gc
import os
import subprocess
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor

from vpt.errors import ConfigError


@dataclass(frozen=True)
class World:
    """A process of a run and the group it belongs to; alone by default.

    Attributes:
        rank, size: number of this process, and of all. Rank 0 prints, logs, draws and writes.
        local_rank, local_size: among the processes of this node.
        address: `host:port` of rank 0; None where torchrun has set it in the environment.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    address: str | None = None

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> "World":
        """Ranks as `torchrun` or `srun` gave them in the environment; one process where neither did."""
        known = environment.get
        if known("RANK") is not None and known("WORLD_SIZE") is not None:
            size = int(known("WORLD_SIZE", "1"))
            local_rank, local_size = int(known("LOCAL_RANK", "0")), int(known("LOCAL_WORLD_SIZE", str(size)))
            return cls(int(known("RANK", "0")), size, local_rank, local_size)
        if int(known("SLURM_STEP_NUM_TASKS", "1")) > 1:  # set inside `srun` only, not in the batch script
            size, nodes = int(environment["SLURM_STEP_NUM_TASKS"]), int(known("SLURM_STEP_NUM_NODES", "1"))
            return cls(
                int(environment["SLURM_PROCID"]), size, int(environment["SLURM_LOCALID"]), -(-size // nodes),
                _slurm_address(environment),
            )  # fmt: skip
        return cls()

    @property
    def is_main(self) -> bool:
        """True on rank 0, which prints, logs, draws and writes."""
        return self.rank == 0

    def all_gather(self, values: list[int]) -> Tensor:
        """Integers from every rank, equally many from each: [size, n], on the CPU. One collective."""
        mine = torch.tensor(values, dtype=torch.int64)
        if self.size == 1:
            return mine[None]
        everyone = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(everyone, mine)
        return torch.stack(everyone)

    def all_reduce(self, values: Tensor) -> Tensor:
        """The sum over ranks, on the device of `values`."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def barrier(self) -> None:
        """Wait until every rank is here."""
        self.all_gather([0])

    def broadcast(self, value: int) -> int:
        """The integer of rank 0, on every rank: a file system may show other ranks another state of a folder."""
        return int(self.all_gather([value])[0, 0])

    def all_gather_text(self, text: str) -> list[str]:
        """One text from each rank, in rank order, on every rank."""
        texts = [text] * self.size
        if self.size > 1:  # pickles what the ranks of this run send each other; no file is ever unpickled
            dist.all_gather_object(texts, text)
        return texts


def _slurm_address(environment: Mapping[str, str]) -> str:
    """The first node of the job, and a port that two jobs on one node are unlikely to share."""
    if "MASTER_ADDR" in environment:
        return f"{environment['MASTER_ADDR']}:{environment.get('MASTER_PORT', '29500')}"
    nodes = environment.get("SLURM_STEP_NODELIST", environment["SLURM_JOB_NODELIST"])
    names = subprocess.run(["scontrol", "show", "hostnames", nodes], capture_output=True, text=True, check=True).stdout
    return f"{names.split()[0]}:{20000 + int(environment['SLURM_JOB_ID']) % 20000}"


@contextmanager
def init_process_group(*, device: str, always: bool = False) -> Iterator[World]:
    """Join the process group of this run, with `always` even of one process, as sharding needs it; leave together.

    Whatever holds the group or groups of its own (DDP, sharded tensors, a checkpoint's saver) must go out of scope
    before the end: a group that is taken down while they are there, or by the interpreter's exit, may wait for ever.
    """
    world = World.from_environment()
    if world.size == 1 and not always:
        yield world
        return
    on_gpu = device != "cpu" and torch.cuda.is_available()
    if on_gpu:
        if world.local_rank >= torch.cuda.device_count():
            raise ConfigError(
                f"process {world.local_rank} of this node has no GPU of its own ({torch.cuda.device_count()} here); "
                "start one process for each GPU, or type device=cpu"
            )
        torch.cuda.set_device(world.local_rank)
    if dist.is_initialized():  # left behind by a member of a sweep that failed
        dist.destroy_process_group()
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if world.size == 1:
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    elif world.address:
        dist.init_process_group(backend, f"tcp://{world.address}", rank=world.rank, world_size=world.size)
    else:
        dist.init_process_group(backend)
    yield world
    gc.collect()  # they are in cycles of references
    world.barrier()  # no process leaves while another still exchanges something; not so after an error, which may be
    dist.destroy_process_group()  # of this process alone
