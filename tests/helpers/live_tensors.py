"""Bytes of the tensors that are alive at once, counted operation by operation: also of fake tensors, which hold none."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class PeakBytes(TorchDispatchMode):
    """The most bytes that were alive at a time among tensors made within the context.

    Attributes:
        bytes: that peak.
    """

    def __init__(self, known: Iterable[Tensor]) -> None:
        """`known`: tensors that are there before, and are not counted."""
        super().__init__()
        self.known = {tensor.untyped_storage()._cdata for tensor in known}
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.at_most = self.bytes = 0  # at_most: what is alive, and what has been freed since it was last looked at

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # it runs the operation on its shard, which is what takes memory
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if isinstance(tensor, Tensor):
                self._note(tensor.untyped_storage())
        self._look()
        return out

    def __enter__(self) -> "PeakBytes":
        self._resize = resize = torch.UntypedStorage.resize_

        def noted(storage: torch.UntypedStorage, size: int) -> Any:
            """FSDP frees and fills gathered weights in this way, and no operation tells of it."""
            out = resize(storage, size)
            self._note(storage)
            self._look()
            return out

        torch.UntypedStorage.resize_ = noted  # type: ignore[method-assign]
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        torch.UntypedStorage.resize_ = self._resize  # type: ignore[method-assign]
        super().__exit__(*error)

    def _note(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key in self.known:
            return
        before = self.alive.get(key)  # the same, or another one that lay here
        self.at_most += storage.nbytes() - (before[1] if before else 0)
        self.alive[key] = StorageWeakRef(storage), storage.nbytes()

    def _look(self) -> None:
        if self.at_most > self.bytes:
            self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
            self.at_most = sum(size for _, size in self.alive.values())
            self.bytes = max(self.bytes, self.at_most)
