"""Keys and values while generating: padded tensors for each layer, rows of different lengths, grown by doubling."""

import numpy as np
import torch
from torch import Tensor

from vpt.models.inner_forward import StagedKVCache


class KVCache:
    """The cache of rows that decode together. It has the `update` of transformers' caches.

    Attributes:
        lengths: cached positions of each row; positions beyond are scratch.
        layers: keys and values of each layer, [R, kv heads, K, d] each.
    """

    def __init__(self, stages: StagedKVCache, final: Tensor, lengths: list[int]) -> None:
        """Take over the keys and values of the prompts.

        Args:
            stages: the cache that the prompts ran on.
            final: [N] for each packed position, which of its keys is its last (`ForwardPlan.kv_index`).
            lengths: of the packed rows.
        """
        self.lengths, self.device = list(lengths), final.device
        padded = torch.zeros(len(lengths), max(lengths), dtype=torch.long, device=self.device)
        for row, positions in enumerate(final.split(lengths)):
            padded[row, : len(positions)] = positions
        self.layers: dict[int, list[Tensor]] = {}
        for layer in stages.stages[0]:
            both = (torch.cat(x, dim=2)[0] for x in zip(*(s[layer] for s in stages.stages), strict=True))
            self.layers[layer] = [tensor[:, padded].transpose(0, 1).contiguous() for tensor in both]
        self._slots: tuple[Tensor | slice, Tensor | slice] | None = None
        self._visible = 0

    def reserve(self, counts: list[int]) -> None:
        """Make room for `counts` new positions of each row, to be written by the next `update` of every layer."""
        if len(set(self.lengths)) == len(set(counts)) == 1:  # the rows are level
            self._slots = (slice(None), slice(self.lengths[0], self.lengths[0] + counts[0]))
        else:
            rows = np.repeat(np.arange(len(counts)), counts)
            slots = np.concatenate([np.arange(n, n + c) for n, c in zip(self.lengths, counts, strict=True)])
            self._slots = (torch.from_numpy(rows).to(self.device), torch.from_numpy(slots).to(self.device))
        self._visible = max(n + c for n, c in zip(self.lengths, counts, strict=True))
        capacity = next(iter(self.layers.values()))[0].shape[2]
        if self._visible > capacity:
            extra = max(self._visible, 2 * capacity) - capacity
            for tensors in self.layers.values():
                tensors[:] = [torch.nn.functional.pad(tensor, (0, 0, 0, extra)) for tensor in tensors]

    @classmethod
    def empty(cls, layers: int, heads: int, size: int, *, like: Tensor) -> "KVCache":
        """The cache of no rows yet, for `heads` keys of `size` in each layer, of the type and place of `like`."""
        none = StagedKVCache()
        none.new_stage()
        none.stages[0].update({layer: (like.new_zeros(1, heads, 1, size),) * 2 for layer in range(layers)})
        cache = cls(none, torch.zeros(1, dtype=torch.long, device=like.device), [1])
        cache.select_rows([])
        return cache

    @torch.compiler.disable
    def update(self, key: Tensor, value: Tensor, layer: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """[1, kv heads, N, d] packed -> [R, kv heads, K, d], everything cached."""
        assert self._slots is not None, "reserve comes before update"
        rows, slots = self._slots
        keys, values = self.layers[layer]
        for cached, new in ((keys, key[0]), (values, value[0])):
            if isinstance(rows, slice):
                cached[:, :, slots] = new.unflatten(1, (len(cached), -1)).transpose(0, 1)
            else:
                cached[rows, :, slots] = new.transpose(0, 1).to(cached.dtype)  # as the slice does by itself
        return keys[:, :, : self._visible], values[:, :, : self._visible]

    def commit(self, counts: list[int]) -> None:
        """Count the first `counts` new positions of each row as cached; the rest is forgotten."""
        self.lengths = [n + c for n, c in zip(self.lengths, counts, strict=True)]

    def select_rows(self, rows: list[int]) -> None:
        """Go on with these rows only, and give back room that none of them needs."""
        index = torch.tensor(rows, dtype=torch.long, device=self.device)
        self.lengths = [self.lengths[row] for row in rows]
        longest = max(self.lengths, default=0)
        for tensors in self.layers.values():
            room = tensors[0].shape[2] if tensors[0].shape[2] <= 4 * longest else 2 * longest
            tensors[:] = [tensor[index, :, :room] for tensor in tensors]

    def add_rows(self, count: int) -> None:
        """Add rows of which nothing is cached."""
        self.lengths += [0] * count
        for tensors in self.layers.values():
            tensors[:] = [torch.cat([tensor, tensor.new_zeros(count, *tensor.shape[1:])]) for tensor in tensors]
