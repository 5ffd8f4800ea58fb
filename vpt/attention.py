"""Attention of packed segments over what their rows have cached.

A stage runs one segment of each of several rows, packed one after the other. Each segment attends to the keys that its
row kept from earlier stages, and causally to itself. `Layout` holds that as index tensors, made once a stage and used
by every layer; the decoder layers stay transformers' own and reach this function by name.
"""

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

SEGMENTS = "vpt_segments"

Hidden = tuple[int, int, int]  # queries from the first number on do not see keys between the other two


@dataclass
class Layout:
    """Who attends to whom in one stage. R segments, Q queries and K keys in the longest.

    Attributes:
        rows: R.
        queries: [R * Q] index of each padded query among the packed ones, or None where no padding is needed.
        unpad: [N] index of each packed query among the padded ones, or None likewise.
        keys: [R * K] index of each padded key among all cached ones, or None where keys arrive as [R, heads, K, d].
        mask: [R, 1, Q, K], True where a query sees a key, or None for plain causal attention.
    """

    rows: int
    queries: Tensor | None
    unpad: Tensor | None
    keys: Tensor | None
    mask: Tensor | None

    @classmethod
    def build(
        cls, lengths: list[int], keys: list[np.ndarray] | list[int], *, device: torch.device | str,
        hidden: list[Hidden | None] | None = None,
    ) -> "Layout":  # fmt: skip
        """Lay out one stage.

        Args:
            lengths: queries of each segment; they are the last keys of their row.
            keys: for each segment, the indices of the keys it sees among all cached ones, its own last; or only
                their number, where keys arrive padded.
            device: where the index tensors live.
            hidden: for each segment, a run of its keys that later queries do not see (the reference for masking).
        """
        rows, queries = len(lengths), max(lengths)
        counts = [key if isinstance(key, int) else len(key) for key in keys]
        even = all(length == queries for length in lengths)
        steps = np.arange(queries)
        inside = steps < np.array(lengths)[:, None]  # [R, Q]
        offsets = np.cumsum([0, *lengths[:-1]])
        gather = np.where(inside, offsets[:, None] + steps, 0)

        def tensor(array: np.ndarray) -> Tensor:
            return torch.from_numpy(array).to(device)

        return cls(
            rows=rows,
            queries=None if even else tensor(gather.reshape(-1)),
            unpad=None if even else tensor(np.flatnonzero(inside)),
            keys=_pad_keys(keys, device),
            mask=_visible(lengths, counts, hidden, device),
        )


def _pad_keys(keys: list[np.ndarray] | list[int], device: torch.device | str) -> Tensor | None:
    if isinstance(keys[0], int):
        return None
    arrays: list[np.ndarray] = keys  # type: ignore[assignment]
    padded = np.zeros((len(arrays), max(len(array) for array in arrays)), dtype=np.int64)
    for row, array in enumerate(arrays):
        padded[row, : len(array)] = array
    return torch.from_numpy(padded.reshape(-1)).to(device)


def _visible(
    lengths: list[int], counts: list[int], hidden: list[Hidden | None] | None, device: torch.device | str
) -> Tensor | None:
    past = [count - length for count, length in zip(counts, lengths, strict=True)]
    if not any(past) and not any(hidden or ()):
        return None
    query = torch.arange(max(lengths), device=device)[:, None]
    key = torch.arange(max(counts), device=device)
    # The i-th query of a segment is its row's (past + i)-th key; padded keys lie after every real query.
    mask = key <= query + torch.tensor(past, device=device)[:, None, None]
    for row, run in enumerate(hidden or ()):
        if run is not None:
            first, start, stop = run
            mask[row, first:, start:stop] = False
    return mask[:, None]


def segment_attention(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *,
    layout: Layout, scaling: float, dropout: float = 0.0, **_: object,
) -> tuple[Tensor, None]:  # fmt: skip
    """The attention function that transformers' decoder layers call (`attn_implementation="vpt_segments"`).

    Args:
        query: [1, heads, N, d], the packed queries of a stage.
        key, value: [1, kv heads, all cached, d], or [R, kv heads, K, d] where `layout.keys` is None.

    Returns:
        ([1, N, heads, d], None)
    """
    padded = query[0].transpose(0, 1)  # [N, heads, d]
    if layout.queries is not None:
        padded = padded.index_select(0, layout.queries)
    padded = padded.unflatten(0, (layout.rows, -1)).transpose(1, 2)  # [R, heads, Q, d]
    groups = query.shape[1] // key.shape[1]
    key, value = (_rows_of_keys(x, layout, groups) for x in (key, value))
    out = F.scaled_dot_product_attention(
        padded, key, value, attn_mask=layout.mask, is_causal=layout.mask is None, dropout_p=dropout, scale=scaling
    )
    out = out.transpose(1, 2).flatten(0, 1)  # [R * Q, heads, d]
    if layout.unpad is not None:
        out = out.index_select(0, layout.unpad)
    return out[None], None


def _rows_of_keys(cached: Tensor, layout: Layout, groups: int) -> Tensor:
    """[1, kv heads, all cached, d] -> [R, heads, K, d]; a query head reads the key head of its group."""
    if layout.keys is not None:
        picked = cached[0].transpose(0, 1).index_select(0, layout.keys)
        cached = picked.unflatten(0, (layout.rows, -1)).transpose(1, 2)
    if groups == 1:
        return cached
    return cached[:, :, None].expand(-1, -1, groups, -1, -1).flatten(1, 2)


ALL_ATTENTION_FUNCTIONS.register(SEGMENTS, segment_attention)
