"""Folders of weights as a hub has them, tiny and of random numbers, and ways to damage them."""

import json
import shutil
from copy import deepcopy
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from random import Random

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from conftest import compose_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.models.build import ModelBundle
from vpt.models.vpt import VPTModel

BASE, BASE_3 = "base", "base of three"
BASES = {BASE: "qwen2_vl_2b", BASE_3: "qwen3_vl_2b"}
HARMLESS = {
    BASE: "model.rotary_emb.inv_freq", BASE_3: "model.language_model.rotary_emb.inv_freq", "dino": "classifier.weight", "sam": "mask_decoder.iou_token.weight",
    "siglip": "text_model.head.weight", "openai_clip": "logit_scale",
}  # fmt: skip


def write_base(parts: ModelBundle, folder: Path) -> Path:
    """The base model of a bundle and its tokenizer as a hub has them."""
    parts.model.qwen.save_pretrained(folder)
    parts.tokenizer.save_pretrained(folder)
    return folder


@dataclass
class WeightFolder:
    """One part of a model: its tensors by transformers' present names, and the names that its files have.

    Attributes:
        part: `base` or a re-encoder.
        folder: as transformers' `save_pretrained` wrote it.
        tensors: by name in `state_dict()`.
        written: present name -> name in the files, which is an older one.
    """

    part: str
    folder: Path
    tensors: dict[str, Tensor]
    written: dict[str, str]

    @property
    def prefix(self) -> str:
        """What the names of these tensors begin with in a `VPTModel`."""
        return "qwen." if self.part in BASES else f"encoders.{self.part}.vision."

    @cached_property
    def _config(self) -> TrainConfig:
        """A tiny model with this part alone."""
        base = [f"model={BASES.get(self.part)}", "model.size=tiny", "encoder=[]"]
        return compose_config(*(base if self.part in BASES else [f"encoder=[{self.part}]"]))

    def config(self, folder: Path | None) -> TrainConfig:
        """The configuration that reads this part from a folder, checked as `train.py` does before it builds anything."""
        config = deepcopy(self._config)
        if self.part in BASES:
            config.model.path = str(folder)
        else:
            config.encoder[self.part].path = str(folder) if folder else None
        validate(config)
        return config

    def held_by(self, model: VPTModel, expected: dict[str, Tensor]) -> bool:
        """Whether a model has these tensors, below rows by which its vocabulary has grown."""
        state = model.state_dict()
        return all(torch.equal(state[self.prefix + name][: len(own)], own) for name, own in expected.items())


def write_folders(bundle: ModelBundle, other: ModelBundle, to: Path) -> dict[str, WeightFolder]:
    """A folder for the base model and each re-encoder of a bundle, and for another's base; all numbers differ."""
    found = {}
    torch.manual_seed(0)
    for part, module in {BASE: bundle.model.qwen, BASE_3: other.model.qwen, **bundle.model.visions}.items():
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.normal_(std=0.05)
        module.save_pretrained(to / part)
        if part in BASES:
            bundle.tokenizer.save_pretrained(to / part)
        tensors = {name: tensor.clone() for name, tensor in module.named_parameters()}
        keys = {tuple(tensor.flatten()[:8].tolist()): name for name, tensor in tensors.items()}
        files = load_file(to / part / "model.safetensors")
        written = {keys[tuple(tensor.flatten()[:8].tolist())]: name for name, tensor in files.items()}
        assert written.keys() == tensors.keys()
        found[part] = WeightFolder(part, to / part, {n: t.detach() for n, t in tensors.items()}, written)
    return found


@dataclass
class Damage:
    """A damaged copy of a folder, and what is right for it.

    Attributes:
        named: words of which a refusal must say one; empty where the folder has to load.
        expected: the numbers that a model must have then.
    """

    folder: Path
    expected: dict[str, Tensor]
    named: list[str] = field(default_factory=list)


def damage(folders: dict[str, WeightFolder], part: str, changes: list[str], seed: int, to: Path) -> Damage:
    """Copy a part's folder with some changes: `dropped`, `renamed`, `module`, `reshaped`, `left over`, `harmless`,
    `dtype`, `integers`, `other tensors`, `other folder`, `present names`, `shards`, `truncated`.
    """
    own, random = folders[part], Random(seed)
    shutil.rmtree(to, ignore_errors=True)
    shutil.copytree(own.folder, to)
    found = Damage(to, dict(own.tensors))
    tensors, names = dict(own.tensors), dict(own.written)
    if "present names" in changes:
        names = {name: name for name in names}
    for change in changes:
        _change(change, found, own, tensors, names, random)
    if "other tensors" in changes or "other folder" in changes:
        other = folders[random.choice([name for name in folders if name != part])]
        tensors, names = dict(other.tensors), dict(other.written)
        if "other folder" in changes:
            shutil.copy(other.folder / "config.json", to / "config.json")
            found.named = [f".path={to} holds"]
        else:
            found.named = ["missing: ", "other shape: "]
    _write({names[name]: tensor for name, tensor in tensors.items()}, to, changes, random, found)
    return found


def _change(
    change: str, found: Damage, own: WeightFolder, tensors: dict[str, Tensor], names: dict[str, str], random: Random
) -> None:
    """One change to the tensors, or to their names in the files."""
    name = random.choice(sorted(own.tensors.keys() & tensors.keys()))
    if change == "dropped":
        del tensors[name]
        found.named += [] if name == "embeddings.mask_token" else [own.prefix + name]
        if name in found.expected and not found.named:
            found.expected[name] = torch.zeros_like(found.expected[name])
    elif change == "renamed":
        names[name] = f"{names[name]}_2"
        found.named += [names[name]]
    elif change == "module":
        names.update({name: f"module.{written}" for name, written in names.items()})
        found.named += ["module."]
    elif change == "reshaped":
        grown = [size + (axis == 0) for axis, size in enumerate(tensors[name].shape)]
        tensors[name] = random.choice([torch.zeros(grown), tensors[name][None], tensors[name][1:]])
        found.named += [own.prefix + name]
    elif change in ("left over", "harmless"):
        extra = HARMLESS[own.part] if change == "harmless" else "adapter.weight"
        tensors[extra], names[extra] = torch.zeros(2), extra
        found.named += [extra] if change == "left over" else []
    elif change == "dtype":
        dtype = random.choice([torch.bfloat16, torch.float16, torch.float64])
        floats = [each for each, tensor in tensors.items() if tensor.is_floating_point()]
        for each in floats if random.random() < 0.5 else {name} & {*floats}:
            tensors[each] = tensors[each].to(dtype)
            if each in found.expected:
                found.expected[each] = found.expected[each].to(dtype).float()
    elif change == "integers":
        tensors[name] = tensors[name].to(torch.int8)
        found.named += [names[name]]


def _write(tensors: dict[str, Tensor], to: Path, changes: list[str], random: Random, found: Damage) -> None:
    """Write the files, in two shards with an index or in one, and cut one short."""
    order, file = sorted(tensors), to / "model.safetensors"
    if "shards" in changes:
        file.unlink()
        halves = {f"model-0000{number + 1}-of-00002.safetensors": order[number::2] for number in range(2)}
        index = {"weight_map": {name: shard for shard, own in halves.items() for name in own}}
        (to / "model.safetensors.index.json").write_text(json.dumps(index))
    else:
        halves = {file.name: order}
    for shard, own in halves.items():
        save_file({name: tensors[name].contiguous() for name in own}, to / shard)
    if "truncated" in changes:
        cut = to / random.choice(sorted(halves))
        cut.write_bytes(cut.read_bytes()[: random.randrange(cut.stat().st_size)])
        found.named += [cut.name]
