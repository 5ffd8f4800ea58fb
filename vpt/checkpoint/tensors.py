"""Tensors of a folder by name, as transformers lays them out: one safetensors file, or shards.

Files that could hold anything but tensors are refused, never run.
"""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor, nn

from vpt.distributed.dtensor import shard_like
from vpt.errors import CheckpointError, listed, wrap_read_errors

# `weights_only` reads tensors alone
_CONVERT = (
    'python -c "import pathlib, torch, safetensors.torch as s; [s.save_file({k: v.clone().contiguous() for k, v in '
    "torch.load(f, weights_only=True).items()}, f.with_name(f.stem.replace('pytorch_model', 'model') + "
    "'.safetensors')) for f in pathlib.Path('%s').glob('pytorch_model*.bin')]\""
)


class LazyTensors(Mapping[str, Tensor]):
    """Name -> tensor; a tensor is read from the disk when it is asked for, and none for its name or shape."""

    shapes: dict[str, list[int]]

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


class LazyStateDict(LazyTensors):
    """The tensors of a folder, or of some files."""

    def __init__(self, folder: Path, files: Sequence[Path] | None = None) -> None:
        """Open the weights of `folder`, or `files`. Raises CheckpointError where one is missing or broken."""
        self.folder = folder
        self._home: dict[str, list[SafetensorsFile]] = {}
        for file in weight_files(folder) if files is None else files:
            opened = SafetensorsFile(file)
            for name in opened.names:
                self._home.setdefault(name, []).append(opened)
        with wrap_read_errors(folder, "copy it again"):
            self.shapes = {name: self._shape(name) for name in self._home}

    def __getitem__(self, name: str) -> Tensor:
        home = self._home[name]
        return home[0][name] if len(home) == 1 else _join_shards(name, home, self.shapes[name])

    def _shape(self, name: str) -> list[int]:
        """Shape by the files' headers. Raises ValueError where a tensor's slices are not all there."""
        home = self._home[name]
        slices = {tuple(file.offsets(name)): file.shape(name) for file in home}
        ends = ([begin + size for begin, size in zip(*one, strict=True)] for one in slices.items())
        whole = [max(end) for end in zip(*ends, strict=True)]
        if sum(map(math.prod, slices.values())) != math.prod(whole):
            raise ValueError(f"the slices of {name} do not make up {whole}")
        return whole

    def dtype(self, name: str) -> str:
        """The type of a tensor as its file spells it: F32, BF16, ..."""
        return self._home[name][0].dtype(name)


def weight_files(folder: Path) -> list[Path]:
    """The files that hold a folder's weights. Raises CheckpointError where there are none or a shard is missing."""
    files = [file for file in [folder / "model.safetensors"] if file.is_file()]
    index = folder / "model.safetensors.index.json"
    if not files and index.is_file():
        with wrap_read_errors(index, "copy it again"):
            shards = json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()
            files = [folder / Path(shard).name for shard in sorted(set(shards))]
    files = files or sorted(folder.glob("model-*-of-*.safetensors"))
    if not files and any(folder.glob("pytorch_model*.bin")):
        raise CheckpointError(f"{folder} holds its weights in pickles, which are not read; type: {_CONVERT % folder}")
    if not files:
        raise CheckpointError(
            f"{folder} holds no weights (model.safetensors, or shards of it); copy or download it again"
        )
    absent = [file.name for file in files if not file.is_file()]
    if absent:
        raise CheckpointError(f"{folder} is incomplete, it lacks {', '.join(absent)}; copy or download it again")
    return files


class SafetensorsFile:
    """One safetensors file, mapped into memory; `names` are those of its tensors."""

    def __init__(self, file: Path) -> None:
        with wrap_read_errors(file, "use an older checkpoint, or copy it again"):
            self._open = safe_open(file, framework="pt")
            self.names = list(self._open.keys())
            self._slices = json.loads((self._open.metadata() or {}).get("DCP_SHARDING_INFO", "{}"))

    def __getitem__(self, name: str) -> Tensor:
        return self._open.get_tensor(name)

    def offsets(self, name: str) -> list[int]:
        """Offsets in a tensor of the slice that this file holds."""
        return self._slices[name]["saved_offsets"] if name in self._slices else [0] * len(self.shape(name))

    def shape(self, name: str) -> list[int]:
        """Shape of the slice of a tensor that this file holds."""
        return list(self._open.get_slice(name).get_shape())

    def dtype(self, name: str) -> str:
        """Its type as the file spells it."""
        return self._open.get_slice(name).get_dtype()


def _join_shards(name: str, files: Sequence[SafetensorsFile], shape: Sequence[int]) -> Tensor:
    """Join the slices of a tensor that several processes have saved."""
    slices = [(file.offsets(name), file[name]) for file in files]
    whole = slices[0][1].new_empty(list(shape))
    for offsets, part in slices:
        whole[tuple(slice(begin, begin + size) for begin, size in zip(offsets, part.shape))] = part
    return whole


def unique_state_dict(model: nn.Module) -> dict[str, Tensor]:
    """The state dict with tied weights once: the first name stays."""
    seen: set[int] = set()
    own = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        if id(tensor) not in seen:
            seen.add(id(tensor))
            own[name] = tensor.detach()
    return own


@torch.no_grad()
def fill(model: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Copy tensors, one by one, into those of a model that have their names, each process its part."""
    for name, target in unique_state_dict(model).items():
        if name in tensors:
            target.copy_(shard_like(tensors[name], target))


def check_state_dict(
    stored: Mapping[str, Sequence[int]], own: Mapping[str, Tensor], *, where: Path,
    names: Mapping[str, str] | None = None,
) -> None:  # fmt: skip
    """Raise CheckpointError where `stored` shapes, by the model's names, and the model's `own` tensors do not match.

    It lists what is missing, unexpected (by its name in `names`), or of another shape.
    """
    missing = [name for name in own if name not in stored]
    unexpected = [names[name] if names else name for name in stored if name not in own]
    shapes = shape_mismatches({name: shape for name, shape in stored.items() if name in own}, own)
    problems = [
        f"{kind}: {listed(sorted(found))}"
        for kind, found in (("missing", missing), ("unexpected", unexpected), ("other shape", shapes))
        if found
    ]
    if problems:
        raise CheckpointError(f"{where} does not fit the model; " + "; ".join(problems))


def shape_mismatches(stored: Mapping[str, Sequence[int]], own: Mapping[str, Tensor]) -> list[str]:
    """Stored tensors, by name and both shapes, that have another shape than the model's."""
    return [
        f"{name} {list(shape)} instead of {list(own[name].shape)}"
        for name, shape in stored.items()
        if tuple(shape) != tuple(own[name].shape)
    ]
