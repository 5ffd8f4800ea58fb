"""Attention of packed segments over what their rows have cached.

A stage runs one or more segments of each of several rows, packed one after the other. Each segment attends to keys that
its row has left behind, and causally to itself. `AttentionLayout` says who sees what, once a stage, for every layer;
the decoder layers stay transformers' own and reach `segment_attention` by name. It computes the same in two ways:

    packed   one call of torch's variable-length kernel (`vpt.models.varlen_attention`), where the device has it
    padded   a call of `scaled_dot_product_attention` for each group of segments of about the same size
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from vpt.models.varlen_attention import VarlenIndex, is_supported, varlen_attention

SEGMENT_ATTENTION = "vpt_segments"
Hidden = tuple[int, int, int]  # queries from the first number on do not see keys between the other two
# Segments share a padded call while it computes at most so many scores more than it must, by share and by number.
_PADDING_SHARE, _PADDING_SCORES = 0.2, 2**14


@dataclass(frozen=True)
class PaddedGroup:
    """Segments that attend in one padded call.

    Attributes:
        shape: (R, Q, K): how many they are, queries and keys of the longest.
        queries: [R * Q] which of the stage's packed queries, or None for all of them in order.
        keys: [R * K] which of the cached keys, or None for the first R * K in order; where keys arrive by row, [R]
            which rows, or None for all of them.
        mask: [R, 1, Q, K], True where a query sees a key, or None for plain causal attention, and for one query of each
            segment that sees all keys.
    """

    shape: tuple[int, int, int]
    queries: Tensor | None
    keys: Tensor | None
    mask: Tensor | None


class AttentionLayout:
    """Who attends to whom in one stage."""

    def __init__(
        self, lengths: list[int], keys: list[np.ndarray] | list[int], *, device: torch.device | str,
        hidden: list[Hidden | None] | None = None,
    ) -> None:  # fmt: skip
        """Lay out one stage.

        Args:
            lengths: queries of each segment; they are the last keys that it sees.
            keys: for each segment, the indices of the keys it sees among all cached ones, its own last; or only
                their number, where the cache holds them by row, one row for each segment.
            device: where the index tensors live.
            hidden: for each segment, a run of its keys that later queries do not see (the reference for masking).
        """
        self.lengths, self.keys, self.device = lengths, keys, device
        self.hidden = hidden if any(hidden or ()) else None
        self.counts: list[int] = [key if isinstance(key, int) else len(key) for key in keys]

    @property
    def keys_by_row(self) -> bool:
        """Whether keys arrive as [R, kv heads, K, d], one row for each segment."""
        return isinstance(self.keys[0], int)

    @cached_property
    def varlen_index(self) -> VarlenIndex | None:
        """The stage for the variable-length kernel; None where the kernel cannot express it."""
        if self.keys_by_row or self.hidden is not None:
            return None
        index = self._unless_in_order(np.concatenate(self.keys))  # type: ignore[arg-type]
        return VarlenIndex(self.lengths, self.counts, index, device=self.device)

    @cached_property
    def groups(self) -> list[PaddedGroup]:
        """The stage as padded calls."""
        return [self._group(members) for members in self._members]

    @cached_property
    def order(self) -> Tensor | None:
        """[N] where each packed query lies among the padded ones of all groups; None where nothing was moved."""
        padded = np.concatenate([self._padded_queries(members) for members in self._members])
        where = np.empty(sum(self.lengths), dtype=np.int64)
        where[padded[padded >= 0]] = np.flatnonzero(padded >= 0)
        return None if len(padded) == len(where) and _in_order(where) else self._tensor(where)

    @cached_property
    def _members(self) -> list[list[int]]:
        return bucket_by_size(self.lengths, self.counts)

    def _group(self, members: list[int]) -> PaddedGroup:
        queries = self._padded_queries(members)
        alone = len(members) == len(self.lengths)
        if self.keys_by_row:
            keys = None if alone else self._tensor(members)
        else:
            keys = self._unless_in_order(_padded([self.keys[i] for i in members]).reshape(-1))  # type: ignore[misc]
        return PaddedGroup(
            (len(members), max(self.lengths[i] for i in members), max(self.counts[i] for i in members)),
            queries=None if alone and _in_order(queries) else self._tensor(queries),
            keys=keys,
            mask=self._visible(members),
        )

    def _padded_queries(self, members: list[int]) -> np.ndarray:
        """[R * Q] packed queries of some segments, -1 for padding."""
        starts = np.cumsum([0, *self.lengths])
        return _padded([np.arange(starts[i], starts[i + 1]) for i in members]).reshape(-1)

    def _visible(self, members: list[int]) -> Tensor | None:
        past = [self.counts[i] - self.lengths[i] for i in members]
        hidden = [self.hidden[i] for i in members] if self.hidden else []
        one_each = max(self.lengths[i] for i in members) == 1 and len(set(past)) == 1
        if (one_each or not any(past)) and not any(hidden):
            return None
        query = torch.arange(max(self.lengths[i] for i in members))[:, None]
        key = torch.arange(max(self.counts[i] for i in members))
        # The i-th query of a segment is its (past + i)-th key; padded keys lie after every real query.
        mask = key <= query + torch.tensor(past)[:, None, None]
        for row, run in enumerate(hidden):
            if run is not None:
                first, start, stop = run
                mask[row, first:, start:stop] = False
        return mask[:, None].to(self.device, non_blocking=True)

    def _unless_in_order(self, index: np.ndarray) -> Tensor | None:
        return None if _in_order(index) else self._tensor(index)

    def _tensor(self, values: np.ndarray | list[int]) -> Tensor:
        index = np.asarray(values, dtype=np.int64).clip(0)  # padding reads anything: nothing reads it
        return torch.from_numpy(index).to(self.device, non_blocking=True)


def bucket_by_size(lengths: Sequence[int], counts: Sequence[int]) -> list[list[int]]:
    """Segments of about the same size together, so that padding them costs little: numbers, ascending in each group."""
    groups: list[list[int]] = []
    exact = longest = 0
    for number in sorted(range(len(lengths)), key=lambda i: (lengths[i], counts[i])):
        length, count = lengths[number], counts[number]
        exact, longest = exact + length * count, max(longest, count)
        area = (len(groups[-1]) + 1) * length * longest if groups else 0
        if groups and area <= (1 + _PADDING_SHARE) * exact + _PADDING_SCORES:
            groups[-1].append(number)
        else:
            groups.append([number])
            exact, longest = length * count, count
    return [sorted(group) for group in groups]


@torch.compiler.disable
def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    layout: AttentionLayout, scaling: float, dropout: float = 0.0, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers' decoder layers call (`attn_implementation="vpt_segments"`).

    Args:
        query: [1, heads, N, d], the packed queries of a stage.
        key, value: [1, kv heads, all cached, d], or [R, kv heads, K, d] where `layout.keys_by_row`.

    Returns:
        ([1, N, heads, d], None)
    """
    packed = query[0].transpose(0, 1)  # [N, heads, d]
    if is_supported(value) and not dropout and layout.varlen_index is not None:
        key, value = (x[0].transpose(0, 1) for x in (key, value))
        return varlen_attention(packed, key, value, layout.varlen_index, causal=True, scale=scaling)[None], None
    outs = [_padded_call(packed, key, value, layout, group, scaling, dropout) for group in layout.groups]
    out = outs[0] if len(outs) == 1 else torch.cat(outs)
    return (out if layout.order is None else out.index_select(0, layout.order))[None], None


def _padded_call(
    packed: Tensor, key: Tensor, value: Tensor, layout: AttentionLayout, group: PaddedGroup, scaling: float,
    dropout: float,
) -> Tensor:  # fmt: skip
    """[N, heads, d] packed -> [R * Q, heads, d], the queries of one group with their padding."""
    if group.queries is not None:
        packed = packed.index_select(0, group.queries)
    rows, length, _ = group.shape
    query = packed.unflatten(0, (rows, length)).transpose(1, 2)  # [R, heads, Q, d]
    key, value = (_keys_of(x, layout, group) for x in (key, value))
    heads, shared_by = query.shape[1], query.shape[1] // key.shape[1]
    if length == 1:  # the query heads of a key head are as good as queries: no key is copied
        query = query.unflatten(1, (-1, shared_by)).flatten(2, 3)
    else:
        key, value = (_repeated(x, shared_by) for x in (key, value))
    out = F.scaled_dot_product_attention(
        query, key, value, attn_mask=group.mask, is_causal=group.mask is None and length > 1, dropout_p=dropout,
        scale=scaling,
    )  # fmt: skip
    return out.reshape(rows, heads, length, -1).transpose(1, 2).flatten(0, 1)


def _keys_of(cached: Tensor, layout: AttentionLayout, group: PaddedGroup) -> Tensor:
    """The keys (or values) of a group, [R, kv heads, K, d]."""
    rows, _, count = group.shape
    if layout.keys_by_row:
        cached = cached[:, :, :count]
        return cached if group.keys is None else cached.index_select(0, group.keys)
    picked = cached[0].transpose(0, 1)
    picked = picked[: rows * count] if group.keys is None else picked.index_select(0, group.keys)
    return picked.unflatten(0, (rows, count)).transpose(1, 2)


def _repeated(x: Tensor, times: int) -> Tensor:
    """[R, kv heads, K, d] -> [R, heads, K, d]; a query head reads the key head of its group."""
    return x if times == 1 else x[:, :, None].expand(-1, -1, times, -1, -1).flatten(1, 2)


def _padded(arrays: Sequence[np.ndarray]) -> np.ndarray:
    """[R, longest], -1 where an array has ended."""
    padded = np.full((len(arrays), max(len(array) for array in arrays)), -1, dtype=np.int64)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return padded


def _in_order(index: np.ndarray) -> bool:
    return bool((index == np.arange(len(index))).all())


ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, segment_attention)


@contextmanager
def observed_attention(observe: Callable[[Tensor, Tensor, AttentionLayout, float], None]) -> Iterator[None]:
    """While it lasts, `observe` gets the queries, keys, layout and scaling of every call of `segment_attention`."""

    def observing(module: nn.Module, query: Tensor, key: Tensor, *given: Any, **settings: Any) -> tuple[Tensor, None]:
        observe(query, key, settings["layout"], settings["scaling"])
        return segment_attention(module, query, key, *given, **settings)  # type: ignore[no-any-return]

    ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, observing)
    try:
        yield
    finally:
        ALL_ATTENTION_FUNCTIONS.register(SEGMENT_ATTENTION, segment_attention)
