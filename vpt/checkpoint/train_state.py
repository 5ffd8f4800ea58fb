"""`TrainState` and the optimizer state of a checkpoint: everything besides weights that a run resumes from."""

import json
import math
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint import HuggingFaceStorageReader
from torch.distributed.checkpoint.api import CheckpointException

from vpt.checkpoint.format import STEP_FOLDER
from vpt.checkpoint.frozen_weights import FrozenWeights
from vpt.checkpoint.tensors import LazyStateDict, check_state_dict, unique_state_dict
from vpt.config.former_names import FORMER_STATE
from vpt.errors import wrap_read_errors

_ADAMW = {"step", "exp_avg", "exp_avg_sq"}
_SMALL = {"step", "state1", "state2"}  # bitsandbytes, of a tensor with few numbers
_ADAMW_8BIT = _SMALL | {"absmax1", "absmax2"}
_KEYS = sorted(_ADAMW | _ADAMW_8BIT)


@dataclass
class TrainState:
    """Everything besides tensors that a run resumes from: steps done, its W&B id, its best score so far and that one's
    step, the step that was evaluated last; records left out, steps without a finite gradient, and how many of these
    were the last ones in a row.
    """

    step: int = 0
    wandb_id: str | None = None
    best: float | None = None
    best_step: int | None = None
    evaluated_step: int = 0
    skipped: int = 0
    nonfinite_steps: int = 0
    consecutive_nonfinite: int = 0

    def is_best(self, metrics: Mapping[str, float], *, by: str | None) -> bool:
        """Record a metric if it is better than ever before (a loss: lower), and return True then."""
        if by is None or not math.isfinite(metrics.get(by, math.nan)):
            return False
        sign = -1 if by.endswith("loss") else 1
        if self.best is not None and sign * metrics[by] <= sign * self.best:
            return False
        self.best, self.best_step = metrics[by], self.step
        return True


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by name, as the processes hold it; empty before the first step.

    Without what bytes stand for in 8 bits, a table that all tensors share.
    """
    return {
        f"{name}/{key}": torch.as_tensor(value).detach()
        for name, parameter in _named(optimizer)
        for key, value in optimizer.state.get(parameter, {}).items()
        if key in _KEYS
    }


def _named(optimizer: torch.optim.Optimizer) -> Iterator[tuple[str, Tensor]]:
    for group in optimizer.param_groups:
        yield from zip(group["names"], group["params"], strict=True)


def restore(
    checkpoint: Path, model: nn.Module, optimizer: torch.optim.Optimizer, frozen: FrozenWeights | None = None
) -> TrainState:
    """Read weights and the optimizer's state in place, each process its part, and return the rest.

    `frozen`: weights that the checkpoint names instead of holding them, which are in place.

    Raises CheckpointError where the checkpoint is broken, or of another model.
    """
    with wrap_read_errors(checkpoint, "resume from an older checkpoint"):
        LazyStateDict(checkpoint, sorted(checkpoint.glob("optimizer*.safetensors")))  # its headers make sense
        reader = HuggingFaceStorageReader(str(checkpoint))
        stored: dict[str, Any] = reader.read_metadata().state_dict_metadata
        own = {name: tensor for name, tensor in unique_state_dict(model).items() if name not in (frozen or ())}
        held = {name: entry.size for name, entry in stored.items() if "/" not in name}
        check_state_dict(held, own, where=checkpoint)
        tensors = dict(own)
        tensors |= _blank_states(optimizer, stored)
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        try:
            dcp.load(tensors, storage_reader=reader, no_dist=not dist.is_initialized())
        except CheckpointException as error:  # no Exception; it holds one of each process that failed
            raise next(iter(error.failures.values()))[0] from None
        _complete_8bit(optimizer)
        return _read_state(checkpoint)


def _read_state(checkpoint: Path) -> TrainState:
    """Parse `state.json`. Raises CheckpointError for impossible values: they decide which records come next."""
    with wrap_read_errors(checkpoint / "state.json", "resume from an older checkpoint"):
        stored = json.loads((checkpoint / "state.json").read_text(encoding="utf-8"))
        state = {FORMER_STATE.get(key, key): value for key, value in stored.items()}
        state.setdefault("evaluated_step", state["step"])  # version 0.1 did not say
        known = {item.name for item in fields(TrainState)} & state.keys()
        for key in known:
            hint, value = get_type_hints(TrainState)[key], state[key]
            if isinstance(value, bool) or not isinstance(value, hint):
                raise ValueError(f"{key}={value!r} is not of type {getattr(hint, '__name__', hint)}")
            if isinstance(value, int) and value < 0:
                raise ValueError(f"{key}={value} is negative")
        if checkpoint.name != STEP_FOLDER.format(state["step"]):
            raise ValueError(f"it is of step {state['step']}, the folder is {checkpoint.name}")
        return TrainState(**{key: state[key] for key in known})


def _blank_states(optimizer: torch.optim.Optimizer, stored: Mapping[str, Any]) -> dict[str, Tensor]:
    """Give the optimizer blank state tensors for those that a checkpoint holds, and return them by stored name."""
    tensors: dict[str, Tensor] = {}
    for name, parameter in _named(optimizer):
        state = {key: _blank(stored[f"{name}/{key}"], parameter) for key in _KEYS if f"{name}/{key}" in stored}
        if state and state.keys() not in (_ADAMW, _SMALL, _ADAMW_8BIT):
            raise ValueError(f"of {name}'s moments it holds {', '.join(state)} alone")
        if state:
            optimizer.state[parameter] = state
            tensors |= {f"{name}/{key}": value for key, value in state.items()}
    return tensors


def _blank(stored: Any, parameter: Tensor) -> Tensor:
    """A tensor as one of the checkpoint's metadata; sharded as the parameter where it has its shape."""
    dtype = stored.properties.dtype
    if stored.size and tuple(stored.size) == tuple(parameter.shape):
        return torch.zeros_like(parameter, dtype=dtype)
    return torch.zeros(stored.size, dtype=dtype, device=parameter.device)


def _complete_8bit(optimizer: Any) -> None:
    """Where states are bitsandbytes': steps are numbers again, and bytes have the table of what they stand for."""
    for state in optimizer.state.values():
        if "state1" in state:
            state["step"] = int(state["step"])
        if "absmax1" in state:
            if not optimizer.name2qmap:
                optimizer.fill_qmap()
            tables = zip(("qmap1", "qmap2"), ("dynamic", "udynamic"), strict=True)
            state |= {key: optimizer.name2qmap[kind].to(state["absmax1"].device) for key, kind in tables}
