"""Attention of runs of any length in one call: torch's variable-length kernel, where the device has it.

It computes nothing for padding and knows that a run is causal, so that long rows cost what they must. Elsewhere (a CPU,
float32, an older torch) callers pad instead; both ways give the same numbers up to the rounding of the type.
"""

import inspect
from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

try:
    from torch.nn.attention.varlen import varlen_attn
except ImportError:  # before torch 2.10
    varlen_attn = None  # type: ignore[assignment]


_OPTIONS = frozenset(inspect.signature(varlen_attn).parameters) if varlen_attn is not None else frozenset()


class VarlenIndex:
    """Runs of queries and of keys, one after the other; a run of queries attends to the run of keys of its number.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: [R + 1] int32, where each run begins, and where the last one ends.
        max_seqlen: queries and keys of the longest run.
        index: [sum of the keys' lengths] which keys the runs are made of, or None where they are all keys in order.
    """

    def __init__(
        self, queries: Sequence[int], keys: Sequence[int], index: Tensor | None, *, device: torch.device | str
    ) -> None:
        self.cu_seqlens_q, self.cu_seqlens_k = (
            torch.tensor([0, *accumulate(lengths)], dtype=torch.int32).to(device, non_blocking=True)
            for lengths in (queries, keys)
        )
        self.max_seqlen = (max(queries), max(keys))
        self.index = index
        self.total = sum(keys)


def is_supported(values: Tensor) -> bool:
    """Whether the kernel takes tensors like these: on a GPU of compute capability 8 or more, in half precision."""
    return (
        "window_size" in _OPTIONS
        and values.is_cuda
        and values.dtype in (torch.bfloat16, torch.float16)
        and torch.cuda.get_device_capability(values.device)[0] >= 8
    )


def varlen_attention(
    query: Tensor, key: Tensor, value: Tensor, runs: VarlenIndex, *, causal: bool, scale: float
) -> Tensor:
    """Each run of queries over its run of keys.

    Args:
        query: [queries, heads, d], of the type of `value`, or wider where a rotary embedding left it so.
        key, value: [keys, kv heads, d]; a key head serves as many query heads as there are for each.
        runs: which queries see which keys.
        causal: the last query of a run sees all its keys, the one before all but the last, and so on.
        scale: of the scores.

    Returns:
        [queries, heads, d]
    """
    key, value = (x[: runs.total] if runs.index is None else x.index_select(0, runs.index) for x in (key, value))
    query, key = query.to(value.dtype), key.to(value.dtype)
    shared_by = query.shape[1] // key.shape[1]
    options: dict[str, Any] = {"scale": scale, "window_size": (-1, 0 if causal else -1)}
    if "enable_gqa" in _OPTIONS:
        options["enable_gqa"] = shared_by > 1
    elif shared_by > 1:
        key, value = (x.repeat_interleave(shared_by, dim=1) for x in (key, value))
    return varlen_attn(query, key, value, runs.cu_seqlens_q, runs.cu_seqlens_k, *runs.max_seqlen, **options)  # type: ignore
