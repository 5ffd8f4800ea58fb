"""Strategies by which processes share a step: one alone, copies (DDP), shards (FSDP2), shards with copies (hybrid).

    single   one process
    ddp      every process holds the model; gradients are averaged while the backward pass runs
    fsdp     every process holds a slice of each weight, gradient and optimizer state; a decoder layer's weights are
             gathered while it runs. Units: each decoder layer, the visual tower, each re-encoder's tower; the rest
             (embeddings, head, norms, projectors) is gathered once a micro-batch
    hybrid   fsdp among `shard_size` neighbours (a node by default), copies of that between the groups

All of them compute the gradient of one loss: the sum over the global batch divided by its labelled tokens.
"""

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard
from torch.nn.parallel import DistributedDataParallel

from vpt.config.schema import StrategyConfig
from vpt.distributed.process_group import World
from vpt.errors import ConfigError
from vpt.models.output import Output
from vpt.models.vpt import VPTModel
from vpt.perception.batch import Batch

SHARDED = ("fsdp", "hybrid")
NEEDS_GROUP = ("ddp", *SHARDED)  # those that need a process group even of one process


class Strategy:
    """Runs the model on this process's micro-batches, and says when gradients travel; here of one process, never."""

    name = "single"

    def __init__(self, model: VPTModel, device: torch.device) -> None:
        self.model = model.to(device)

    def __call__(self, batch: Batch) -> Output:
        return self.model(batch)

    def grad_sync(self, *, last: bool) -> contextlib.AbstractContextManager:
        """Context of the forward and backward pass of one micro-batch, which may be the last of its step."""
        return contextlib.nullcontext()

    def whole_weights(self) -> contextlib.AbstractContextManager:
        """Context in which a process runs the model without gradients as often as it likes, whatever others do.
        Entering it is a collective where the model is sharded.
        """
        return contextlib.nullcontext()


class DDP(Strategy):
    """`DistributedDataParallel`; gradients travel in the backward pass of a step's last micro-batch."""

    name = "ddp"

    def __init__(self, model: VPTModel, device: torch.device) -> None:
        super().__init__(model, device)
        # An encoder that no process needs in a step gets no gradient, as in one process: hence find_unused_parameters.
        self.module = DistributedDataParallel(model, broadcast_buffers=False, find_unused_parameters=True)

    def __call__(self, batch: Batch) -> Output:
        return self.module(batch, uniform_backward=True)

    def grad_sync(self, *, last: bool) -> contextlib.AbstractContextManager:
        return contextlib.nullcontext() if last else self.module.no_sync()


class FSDP(Strategy):
    """`fully_shard` over one dimension of processes, or two (hybrid). Gradients are reduced after every micro-batch."""

    def __init__(
        self, model: VPTModel, mesh: DeviceMesh, *, precision: str, reshard_after_forward: bool, cpu_offload: bool
    ) -> None:  # fmt: skip
        """Shard a model in place, whose weights may be on the CPU or on `meta`.

        Args:
            mesh: of one dimension, or (copies, shards).
            precision: with `bf16`, units are gathered as bfloat16 and reduced as float32. Embeddings, head and
                projectors stay float32 as under autocast, so that the residual stream is the same.
            reshard_after_forward: give a unit's weights back after its forward pass, and gather them for the next one.
            cpu_offload: keep shards, their gradients and the optimizer's states on the CPU, where it steps.
        """
        self.name = "fsdp" if mesh.ndim == 1 else "hybrid"
        self.model, self.reshard_after_forward = model, reshard_after_forward
        half = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
        policy = half if precision == "bf16" else MixedPrecisionPolicy()
        place = CPUOffloadPolicy(pin_memory=mesh.device_type != "cpu") if cpu_offload else OffloadPolicy()
        # Outputs of units are never written into, so they may be views.
        warnings.filterwarnings("ignore", "FSDP2-wrapped module .* returned a view tensor")
        self.units = model.shard_units
        for unit in self.units:
            fully_shard(
                unit, mesh=mesh, mp_policy=policy, reshard_after_forward=reshard_after_forward, offload_policy=place
            )
        fully_shard(model, mesh=mesh, offload_policy=place)
        for unit in self.units:
            unit.set_reshard_after_backward(reshard_after_forward)

    def __call__(self, batch: Batch) -> Output:
        return self.model(batch, uniform_backward=True)

    @contextlib.contextmanager
    def grad_sync(self, *, last: bool) -> Iterator[None]:
        yield
        if last and not self.reshard_after_forward:
            for unit in self.units:
                unit.reshard()

    @contextlib.contextmanager
    def whole_weights(self) -> Iterator[None]:
        # The root is the whole model, though a unit of it may run first.
        self.model._get_fsdp_state()._lazy_init()  # type: ignore[operator]
        units = [unit for unit in self.model.modules() if isinstance(unit, FSDPModule)]
        for unit in units:
            unit.set_reshard_after_forward(False, recurse=False)
            unit.unshard()
        yield
        for unit in units:
            unit.set_reshard_after_forward(self.reshard_after_forward and unit is not self.model, recurse=False)
            unit.reshard()
            _forget_forwards(unit)


def _forget_forwards(unit: FSDPModule) -> None:
    """Forget in which order units ran: from it FSDP gathers weights ahead in a backward pass, and processes that ran
    others would gather others, and wait for ever.
    """
    state: Any = unit._get_fsdp_state()
    state._comm_ctx.post_forward_order.clear()
    for group in state._fsdp_param_groups if hasattr(state, "_fsdp_param_groups") else [state._fsdp_param_group]:
        group._post_forward_indices.clear()


def build_strategy(
    config: StrategyConfig, model: VPTModel, world: World, device: torch.device, *, precision: str
) -> Strategy:  # fmt: skip
    """Make a model, whose `requires_grad` are set, ready for the processes that train it.

    Raises ConfigError where a strategy does not fit the number of processes.
    """
    if config.kind == "single":
        if world.size > 1:
            raise ConfigError(f"strategy=single is for one process, {world.size} run; type strategy=ddp or fsdp")
        return Strategy(model, device)
    if config.kind == "ddp":
        return DDP(model, device)
    if config.kind == "fsdp":
        mesh = init_device_mesh(device.type, (world.size,), mesh_dim_names=("shards",))
    else:
        shards = config.shard_size or world.local_size
        if world.size % shards:
            raise ConfigError(f"strategy.shard_size={shards} does not divide the {world.size} processes of this run")
        mesh = init_device_mesh(device.type, (world.size // shards, shards), mesh_dim_names=("copies", "shards"))
    return FSDP(
        model, mesh, precision=precision, reshard_after_forward=config.reshard_after_forward,
        cpu_offload=config.cpu_offload,
    )  # fmt: skip


def choose_strategy(model: VPTModel, world: World, device: torch.device) -> str:
    """The strategy for `auto`: `ddp` where model and optimizer fill at most half of a GPU, else `fsdp`."""
    if world.size == 1:
        return "single"
    if device.type != "cuda":
        return "ddp"
    return "ddp" if fits_replicated(model, torch.cuda.get_device_properties(device).total_memory) else "fsdp"


def fits_replicated(model: VPTModel, memory: float) -> bool:
    """Weights, gradients and AdamW's moments fill at most half of a GPU of `memory` bytes."""
    trained = sum(parameter.nbytes for parameter in model.parameters() if parameter.requires_grad)
    return 3 * trained + sum(parameter.nbytes for parameter in model.parameters()) <= memory / 2
