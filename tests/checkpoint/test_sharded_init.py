"""Sharded models are read slice by slice: from Qwen's folders, upstream checkpoints and our own."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.distributed.tensor import DTensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import compose_config, losses
from helpers.multiprocess import on_ranks
from helpers.weight_folders import write_base
from vpt.checkpoint.export import Export, export
from vpt.checkpoint.format import find_checkpoint, save_weights
from vpt.checkpoint.load import build_model
from vpt.checkpoint.tensors import unique_state_dict
from vpt.checkpoint.train_state import restore
from vpt.distributed.dtensor import full_tensor
from vpt.distributed.process_group import World, init_process_group
from vpt.errors import CheckpointError
from vpt.training.optimizer import build_optimizer
from vpt.training.setup import build_training
from vpt.training.trainer import Trainer


class Alive(TorchDispatchMode):
    """The most bytes that were in memory at a time, among all tensors that any operation has read or made."""

    def __init__(self) -> None:
        super().__init__()
        self.alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self.most = 0

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        out = operation(*args, **(kwargs or {}))
        for tensor in tree_leaves((args, kwargs, out)):
            tensor = tensor.to_local() if isinstance(tensor, DTensor) else tensor
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                storage = tensor.untyped_storage()
                self.alive[storage._cdata] = (StorageWeakRef(storage), storage.nbytes())
        self.alive = {key: entry for key, entry in self.alive.items() if not entry[0].expired()}
        self.most = max(self.most, sum(size for _, size in self.alive.values()))
        return out


def settings(weights: str, *overrides: str):
    return compose_config(
        "+experiment=dino", "model=qwen2_vl_2b", f"model.path={weights}", "model.size=tiny", "+debug=two_steps",
        "training.steps=3", "training.batch_size=4", "training.checkpoint_every=1000", *overrides,
    )  # fmt: skip


def from_files(world: World, weights: str, to: str) -> dict[str, float]:
    """Three steps from a folder of weights, with adapters; how much of the model was in memory at a time, begun and
    taken up.
    """
    name = "fsdp" if world.size > 1 else "single"
    config = settings(weights, "model.lora.rank=2", f"strategy={name}")
    Trainer(config, Path(to) / name, world).fit()
    found, shares = find_checkpoint(Path(to) / name), {}
    for moment, place in (("begun", None), ("resumed", found)):
        with Alive() as memory:
            built = build_training(config, place, world, torch.device("cpu"))
            model = built.bundle.model
            if place:
                restore(place, model, build_optimizer(model, config.optim), built.frozen)
        shares[moment] = memory.most / sum(parameter.nbytes for parameter in model.parameters())
    return shares


def plain(folder: Path) -> Path:
    """Weights as Qwen's are laid out, of a vocabulary that must grow."""
    parts = build_model(compose_config("encoder=[]", "model.region_bins=0"))
    parts.model.qwen.resize_token_embeddings(len(parts.tokenizer))
    return write_base(parts, folder / "weights")


def upstream(folder: Path) -> Path:
    """The same in the authors' format, with DINOv2 and its projector."""
    parts = build_model(compose_config("encoder=[dino]", "model.region_bins=0"))
    parts.model.qwen.resize_token_embeddings(len(parts.tokenizer))
    ours = folder / "ours"
    ours.mkdir()
    save_weights(ours, parts)
    return export(Export(str(ours), str(folder / "weights"), "upstream"))


@pytest.mark.slow
@pytest.mark.parametrize(("written", "most"), [(plain, 0.7), (upstream, 0.62)])
def test_a_sharded_model_is_never_whole(tmp_path, written, most):
    """Shapes first, then every process reads its slices: the same run as from a model that was built whole.

    `most`: a half, and twice the table of tokens while it grows, 0.06 of this model; of a folder of Qwen's also the
    other half of DINOv2, which is not in it and so is built whole.
    """
    weights = str(written(tmp_path))
    shares = on_ranks(2, from_files, weights, str(tmp_path), folder=tmp_path)
    alone = from_files(World(), weights, str(tmp_path))
    assert all(share["begun"] < most for share in shares)
    assert all(share["resumed"] < 0.6 * alone["resumed"] for share in shares)  # with AdamW's moments
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "single"), rel=1e-5)


def test_an_upstream_checkpoint_in_slices_is_the_one_that_is_read_whole(tmp_path):
    """Every tensor and what is frozen; and what is missing or left over is named."""
    weights = upstream(tmp_path)
    with init_process_group(device="cpu", always=True) as world:
        whole, sliced = (
            build_training(settings(str(weights), f"strategy={kind}"), None, world, torch.device("cpu"))[0].model
            for kind in ("single", "fsdp")
        )
        ours, theirs = unique_state_dict(whole), unique_state_dict(sliced)
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(tensor, theirs[name].full_tensor()) for name, tensor in ours.items())
        trained = [{n for n, p in model.named_parameters() if p.requires_grad} for model in (whole, sliced)]
        assert trained[0] == trained[1]
        tensors = load_file(weights / "model.safetensors")
        tensors["model.norm.extra"] = tensors.pop("model.norm.weight")
        save_file(tensors, weights / "model.safetensors")
        with pytest.raises(CheckpointError, match=r"missing: qwen\..*norm\.weight; unexpected: model\.norm\.extra"):
            build_training(settings(str(weights), "strategy=fsdp"), None, world, torch.device("cpu"))


@pytest.mark.parametrize("overrides", [["encoder=[openai_clip]"], ["encoder=[dino,sam,clip]", "model=tiny_2_5"]])
def test_random_weights_are_those_of_the_seed(overrides):
    """Whatever shares the model, and whatever has been drawn before."""
    with init_process_group(device="cpu", always=True) as world:
        models = [
            build_training(
                compose_config("data=scenes", *overrides, f"strategy={kind}"), None, world, torch.device("cpu")
            )[0].model
            for kind in ("single", "ddp", "fsdp")
        ]
        whole = unique_state_dict(models[0])
        for model in models[1:]:
            own = unique_state_dict(model)
            assert own.keys() == whole.keys()
            assert all(torch.equal(full_tensor(own[name]), tensor) for name, tensor in whole.items())
