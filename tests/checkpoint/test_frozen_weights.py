"""Checkpoints name frozen weights of a folder: what they hold, moved and changed folders, starting from and exporting."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

import vpt
from conftest import compose_config, compose_eval, losses
from helpers.multiprocess import on_ranks
from helpers.stopped import fit_until
from helpers.weight_folders import write_base
from vpt.checkpoint.export import Export, export
from vpt.checkpoint.format import find_checkpoint, save_weights
from vpt.checkpoint.frozen_part import FROZEN
from vpt.checkpoint.frozen_weights import FrozenWeights
from vpt.checkpoint.load import build_model, build_new, load_any_config, load_pretrained, weights_digest
from vpt.checkpoint.tensors import LazyStateDict, unique_state_dict
from vpt.cli.ask import read_arguments
from vpt.cli.evaluate import Evaluation
from vpt.cli.export import parse
from vpt.cli.serve import read_arguments as read_serve_arguments
from vpt.config.schema import TrainConfig
from vpt.config.weight_folder import moved_paths
from vpt.distributed.process_group import World
from vpt.errors import CheckpointError, ConfigError
from vpt.estimate.memory import state_bytes
from vpt.models.lora import merged
from vpt.training.optimizer import set_trainable
from vpt.training.trainer import Trainer

LORA = ("model.lora.rank=2", "model.lora.alpha=8")


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Path:
    """A base model, whose table of tokens must grow, and a DINOv2, as transformers writes them, in float32."""
    root = tmp_path_factory.mktemp("bases")
    torch.manual_seed(3)
    parts = build_model(compose_config("encoder=[dino]", "model.region_bins=0"))
    write_base(parts, root / "base")
    parts.model.visions["dino"].save_pretrained(root / "dino")
    return root


def settings(bases: Path, *overrides: str) -> TrainConfig:
    return compose_config(
        "+experiment=dino", "model=qwen2_vl_2b", f"model.path={bases}/base", f"encoder.dino.path={bases}/dino",
        "model.size=tiny", "+debug=two_steps", "training.batch_size=4", "data.limit=4", *overrides,
    )  # fmt: skip


def fit(config: TrainConfig, folder: Path, world: World | None = None, *, stop: int = 0) -> Trainer:
    """Train to the end, or until a signal after step `stop`."""
    return fit_until(Trainer(config, folder, world), stop)


@pytest.fixture(scope="module")
def adapted(bases, tmp_path_factory) -> Trainer:
    """A run of two steps with adapters, for tests that change nothing in it."""
    return fit(settings(bases, *LORA), tmp_path_factory.mktemp("runs") / "adapted")


@pytest.fixture
def moved(bases, tmp_path):
    """Moves the folders elsewhere while a test runs; returns where to."""
    there = tmp_path / "moved"
    bases.rename(there)
    yield there
    there.rename(bases)


def paths(bases: Path) -> dict[str, str]:
    return {"model.path": f"{bases}/base", "encoder.dino.path": f"{bases}/dino"}


def same(model, other) -> bool:
    ours, theirs = model.state_dict(), other.state_dict()
    return ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_checkpoint_holds_what_was_trained(adapted, bases):
    found = find_checkpoint(adapted.folder)
    trained = {name for name, tensor in adapted.model.named_parameters() if tensor.requires_grad}
    assert LazyStateDict(found).keys() == trained
    named = json.loads((found / FROZEN).read_text())
    assert {key: entry["path"] for key, entry in named.items()} == paths(bases)
    assert (
        set().union(*(entry["tensors"] for entry in named.values()))
        == unique_state_dict(adapted.model).keys() - trained
    )
    assert same(load_pretrained(found).model, adapted.model)
    assert state_bytes(adapted.model, adapted.config)[0] == sum(
        tensor.nbytes for tensor in LazyStateDict(found).values()
    )
    assert len(weights_digest(found).split()) == 3  # its own, the base's, DINOv2's


def test_the_key_keeps_copies(adapted, bases, tmp_path):
    copied = fit(settings(bases, *LORA, "training.save_frozen_weights=true"), tmp_path / "copied")
    found = find_checkpoint(copied.folder)
    assert LazyStateDict(found).keys() == unique_state_dict(copied.model).keys() and not (found / FROZEN).exists()
    assert losses(copied.folder) == losses(adapted.folder)
    run = shutil.copytree(adapted.folder, tmp_path / "run", symlinks=True)  # which goes on with copies
    again = Trainer(settings(bases, *LORA, "training.save_frozen_weights=true"), run)
    again.save()
    again.saver.wait()
    assert LazyStateDict(find_checkpoint(run)).keys() == unique_state_dict(copied.model).keys()
    assert same(load_pretrained(run).model, copied.model)


def test_files_are_read_once(adapted, bases, monkeypatch):
    """By the run, not at every save; and not again by the same process."""
    read = []
    monkeypatch.setattr("vpt.checkpoint.frozen_part.sha256", lambda file: read.append(file))
    load_pretrained(adapted.folder)
    assert not read


@pytest.mark.slow
def test_a_run_goes_on_where_its_base_was_moved_to(bases, tmp_path):
    whole = fit(settings(bases, *LORA, "training.steps=3"), tmp_path / "whole")
    run = tmp_path / "run"
    fit(settings(bases, *LORA, "training.steps=3"), run, stop=2)
    moved = bases.rename(tmp_path / "moved")
    try:
        with pytest.raises(
            ConfigError, match=r"encoder\.dino\.path: folder .* does not exist; type encoder\.dino\.path="
        ):
            settings(bases, *LORA)
        again = fit(settings(moved, *LORA, "training.steps=3"), run)
    finally:
        moved.rename(bases)
    assert losses(run) == losses(whole.folder) and same(again.model, whole.model)
    assert {
        key: entry["path"] for key, entry in json.loads((find_checkpoint(run) / FROZEN).read_text()).items()
    } == paths(moved)


def test_a_moved_base_is_asked_for(adapted, moved, tmp_path):
    """Before anything is built, by every program; whoever is told where it is, finds it."""
    for read in (load_pretrained, load_any_config):
        with pytest.raises(CheckpointError, match=r"model\.path .* is not there; type model\.path=NEW_PLACE"):
            read(adapted.folder)
    assert same(vpt.load(adapted.folder, paths=paths(moved)).model, adapted.model)
    typed = [f"{key}={path}" for key, path in paths(moved).items()]
    _, _, asked = read_arguments(["a.png", "what?", "checkpoint=x", *typed])
    served = read_serve_arguments(["checkpoint=x", *typed])
    evaluated = compose_eval(f"checkpoint={adapted.folder}", *typed)
    for config in (asked, served, evaluated):
        assert moved_paths(config.model, config.encoder) == paths(moved)
    Evaluation.plan(evaluated, evaluated.checkpoint)
    wanted = parse([f"checkpoint={adapted.folder}", f"to={tmp_path}/whole", *typed])
    whole = export(wanted)
    assert same(load_pretrained(whole).model, adapted.model) and not (whole / FROZEN).exists()


def test_a_changed_base_is_refused(adapted, bases, tmp_path):
    file = bases / "base" / "model.safetensors"
    tensors, before = load_file(file), file.read_bytes()
    name = next(name for name in tensors if "down_proj" in name)
    save_file(tensors | {name: tensors[name] + 1}, file, metadata={"format": "pt"})
    try:
        for refused in (
            lambda: load_pretrained(adapted.folder),
            lambda: Trainer(settings(bases, *LORA, "training.steps=4"), adapted.folder),
            lambda: Trainer(settings(bases, f"init_from={adapted.folder}"), tmp_path / "next"),
        ):
            with pytest.raises(CheckpointError, match=r"model\.safetensors has changed .*type model\.path=FOLDER"):
                refused()
        save_file({n: tensor for n, tensor in tensors.items() if n != name}, file)
        with pytest.raises(CheckpointError, match=r"lacks .*down_proj.*; type model\.path=FOLDER"):
            load_pretrained(adapted.folder)
        file.unlink()
        with pytest.raises(CheckpointError, match="holds no weights"):
            load_pretrained(adapted.folder)
    finally:
        file.write_bytes(before)
    assert same(load_pretrained(adapted.folder).model, adapted.model)


def test_another_base_is_no_place_to_go_on(adapted, bases, tmp_path):
    """Though the recorded one is still there."""
    other = shutil.copytree(bases / "base", tmp_path / "other")
    tensors = load_file(other / "model.safetensors")
    save_file({name: tensor + 1 for name, tensor in tensors.items()}, other / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"other/model\.safetensors has changed .*type model\.path=FOLDER"):
        Trainer(settings(bases, *LORA, f"model.path={other}"), adapted.folder)
    assert same(vpt.load(adapted.folder, paths={"model.path": str(other)}).model, adapted.model)


def test_a_damaged_list_is_named(adapted, tmp_path):
    found = find_checkpoint(adapted.folder)
    for text in ("{", '{"model.path": {"files": {"../x": "0"}}}', '{"model.path": 3}', "[]"):
        (tmp_path / FROZEN).write_text(text)
        with pytest.raises(CheckpointError, match=r"frozen_weights\.json cannot be read"):
            FrozenWeights.named_by(tmp_path)
    assert len(FrozenWeights.named_by(found)) > 0


@pytest.mark.slow
def test_starting_from_a_run_keeps_what_both_name(adapted, bases, tmp_path):
    """What an earlier stage trained is copied: no folder has it."""
    named = FrozenWeights.named_by(find_checkpoint(adapted.folder))
    second = Trainer(settings(bases, *LORA, f"init_from={adapted.folder}"), tmp_path / "second")
    assert same(second.model, adapted.model) and second.named.keys() == named.keys()
    third = Trainer(settings(bases, "optim.freeze=['*layers*']", f"init_from={adapted.folder}"), tmp_path / "third")
    assert not any("language_model.layers" in name and "proj.weight" in name for name in third.named)
    assert any("visual" in name for name in third.named)
    third.save()
    third.saver.wait()
    assert same(load_pretrained(third.folder).model, third.model)


@pytest.mark.parametrize("overrides", [("model=small",), ("model=tiny",)])
def test_what_no_folder_of_the_users_holds_is_copied(overrides):
    """Weights that are installed with the package, and random ones."""
    config = compose_config("encoder=[dino]", *overrides, *LORA)
    bundle, stored = build_new(config)
    set_trainable(bundle.model, config.optim, tower_pretrained=config.model.path is not None)
    assert not FrozenWeights.of(bundle.model, stored, {"model.path": "", "encoder.dino.path": ""})


def in_two(world: World, bases: str, to: str, kind: str) -> list[float]:
    return losses(fit(settings(Path(bases), *LORA, "training.steps=4", f"strategy={kind}"), Path(to), world).folder)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_two_processes_save_and_read_their_part(adapted, bases, tmp_path, kind):
    alone = fit(settings(bases, *LORA, "training.steps=4"), tmp_path / "alone")
    run = tmp_path / "run"
    fit(settings(bases, *LORA, "training.steps=4"), run, stop=2)
    [shown, _] = on_ranks(2, in_two, str(bases), str(run), kind, folder=tmp_path)
    assert shown == pytest.approx(losses(alone.folder), rel=1e-5)
    last = find_checkpoint(run)
    trained = {name for name, tensor in alone.model.named_parameters() if tensor.requires_grad}
    assert LazyStateDict(last).keys() == trained and (last / FROZEN).exists()
    loaded = load_pretrained(run).model.state_dict()
    for name, tensor in alone.model.state_dict().items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-3, atol=1e-4)


def test_peft_reads_its_format(adapted, bases, tmp_path):
    peft = pytest.importorskip("peft")
    bundle = load_pretrained(adapted.folder)
    with torch.no_grad():
        for name, parameter in bundle.model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.1)
    (tmp_path / "ours").mkdir()
    save_weights(tmp_path / "ours", bundle)
    written = export(Export(str(tmp_path / "ours"), str(tmp_path / "peft"), "peft"))
    assert {path.name for path in written.iterdir()} >= {"adapter_config.json", "adapter_model.safetensors"}
    base = AutoModelForImageTextToText.from_pretrained(bases / "base")
    base.resize_token_embeddings(len(bundle.model.language.embed_tokens.weight), mean_resizing=False)
    theirs = peft.PeftModel.from_pretrained(base, written).merge_and_unload().state_dict()
    want = merged(bundle.model.qwen.state_dict(), bundle.config.model.lora)
    assert want.keys() == theirs.keys()
    torch.testing.assert_close(theirs, want, rtol=1e-5, atol=1e-5)
