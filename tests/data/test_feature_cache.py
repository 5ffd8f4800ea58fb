"""What frozen encoders see, kept on disk: nothing changes but the time."""

import json
import multiprocessing
import shutil
from dataclasses import replace

import pytest
import torch

from conftest import ALL, action_turns, compose_config, conversation, losses, samples_of
from helpers.gradients import assert_same, losses_and_gradients
from vpt.cli.train import train
from vpt.config.schema import DataConfig
from vpt.data.collate import collate
from vpt.data.feature_cache import FeatureCache
from vpt.data.images import MediaStore
from vpt.data.references import ImageRef
from vpt.data.transforms import ProcessedImage
from vpt.models.vpt import VPTModel
from vpt.training.frozen_features import open_feature_cache
from vpt.training.trainer import Trainer


@pytest.fixture
def parts(make_parts):
    """A model whose towers are frozen."""
    parts = make_parts(*ALL)
    freeze(parts.model)
    yield parts
    parts.model.feature_cache = None


def freeze(model):
    model.requires_grad_(True)
    for tower in (model.qwen.model.visual, model.encoder("dino").vision, model.encoder("sam").vision):
        tower.requires_grad_(False)


def opened(parts, root, *, gigabytes=1.0, precision="fp32"):
    store = open_feature_cache(DataConfig(feature_cache=str(root), feature_cache_gb=gigabytes), parts.model,
                              precision=precision)  # fmt: skip
    parts.model.feature_cache = store
    return store, replace(parts, processor=parts.processor.with_feature_cache(store))


def batch_through(parts, folder):
    return collate(samples_of(parts, folder))


def count_calls(module):
    calls = []
    module.register_forward_pre_hook(lambda *_: calls.append(1))
    return calls


def test_known_features_change_nothing(parts, folder, tmp_path):
    want = losses_and_gradients(parts, batch_through(parts, folder), "shared")
    store, keeping = opened(parts, tmp_path)
    first = batch_through(keeping, folder)
    written = losses_and_gradients(parts, first, "shared")
    assert_same(written, want, loss=0, gradients=0, rounding=0)
    store.flush()
    _, again = opened(parts, tmp_path)
    second = batch_through(again, folder)
    assert set(second.images) == {"image", "dino", "sam"}
    for view, images in second.images.items():
        videos = [grid for grid in first.images[view].grids if grid[0] > 1]
        assert images.cached
        assert images.grids == videos  # these are always looked at anew
        assert len(images.uncached) == len(videos)
    calls = count_calls(parts.model.encoder("dino").vision)
    assert_same(losses_and_gradients(parts, second, "shared"), want)
    assert not calls


def test_some_known_and_some_not(parts, folder, tmp_path):
    """Images of one view that come from the folder and from the encoder, in any order."""
    want = losses_and_gradients(parts, batch_through(parts, folder), "shared")
    store, keeping = opened(parts, tmp_path)
    losses_and_gradients(parts, batch_through(keeping, folder), "shared")
    store.flush()
    for number, path in enumerate(sorted(tmp_path.glob("*/*.safetensors"))):
        if number % 2:
            path.unlink()
    _, again = opened(parts, tmp_path)
    mixed = batch_through(again, folder)
    assert any(images.cached and images.uncached for images in mixed.images.values())
    assert_same(losses_and_gradients(parts, mixed, "shared"), want)


def test_what_an_entry_is_named_by(parts, folder, tmp_path):
    """The image's bytes, crop, limits, transform; the encoder's weights and precision."""
    store, _ = opened(parts, tmp_path / "store")
    view = parts.processor.transforms["dino"]
    shutil.copy(folder.root / "1.png", tmp_path / "same.png")
    shutil.copy(folder.root / "2.png", tmp_path / "other.png")
    elsewhere = MediaStore(tmp_path)
    base = store.key(view, ImageRef("1.png"), folder)
    assert base == store.key(view, ImageRef("same.png"), elsewhere)  # the same bytes under another name
    others = [
        store.key(view, ImageRef("other.png"), elsewhere),
        store.key(view, ImageRef("1.png", (0, 0, 20, 20)), folder),
        store.key(view, ImageRef("1.png", transpose=1), folder),
        store.key(view, ImageRef("1.png"), replace(folder, max_side=32)),
        store.key(view, ImageRef("1.png"), replace(folder, crop_max_side=32)),
        store.key(view, ImageRef("1.png"), replace(folder, resample="bicubic")),
        store.key(replace(view, side=view.side // 2), ImageRef("1.png"), folder),
        store.key(parts.processor.transforms["sam"], ImageRef("1.png"), folder),
        opened(parts, tmp_path, precision="bf16")[0].key(view, ImageRef("1.png"), folder),
    ]
    weight = parts.model.encoder("dino").vision.layernorm.weight
    with torch.no_grad():
        weight[0] += 1e-3
        others.append(opened(parts, tmp_path)[0].key(view, ImageRef("1.png"), folder))
        weight[0] -= 1e-3
    assert len({base, *others}) == len(others) + 1
    assert store.key(view, ImageRef("missing.png"), folder) is None


def test_what_is_trained_is_not_kept(parts, folder, tmp_path):
    parts.model.encoder("dino").vision.layernorm.weight.requires_grad_(True)
    store, keeping = opened(parts, tmp_path)
    assert set(store.fingerprints) == {"image", "sam"}
    losses_and_gradients(parts, batch_through(keeping, folder), "shared")
    store.flush()
    _, again = opened(parts, tmp_path)
    images = batch_through(again, folder).images
    assert not images["dino"].cached
    assert images["sam"].cached
    assert not images["sam"].uncached
    freeze(parts.model)


def kept(store, name, values=2560):
    """Put a made-up entry in the store; the key is as long as real ones."""
    key = name * 40
    store._submit(key, torch.full((values // 10, 10), 1.0), values // 10, None)
    return key


def test_a_broken_entry_is_removed(parts, tmp_path):
    store, _ = opened(parts, tmp_path)
    key = kept(store, "a")
    store.flush()
    path = store._path(key)
    assert isinstance(store.get(key), ProcessedImage)
    path.write_bytes(path.read_bytes()[:-100])
    assert store.get(key) is None
    assert not path.exists()


def test_the_folder_keeps_its_limit(parts, tmp_path):
    """The least recently used go first."""
    store, _ = opened(parts, tmp_path, gigabytes=100_000 / 2**30)
    keys = []
    for name in "0123456789abcdef":
        keys.append(kept(store, name))  # 10,240 bytes and a header
        store.flush()
        store.get(keys[0])  # used again and again
    held = sum(path.stat().st_size for path in tmp_path.glob("*/*"))
    assert 50_000 < held <= 100_000
    assert store.get(keys[0]) is not None
    assert store.get(keys[1]) is None
    assert store.get(keys[-1]) is not None


def test_a_full_disk_ends_no_run(parts, tmp_path, monkeypatch, capsys):
    def full(*_):
        raise OSError("no space left on device")

    monkeypatch.setattr("vpt.data.feature_cache.save_file", full)
    store, _ = opened(parts, tmp_path)
    kept(store, "a")
    kept(store, "b")
    store.flush()
    assert capsys.readouterr().out == "features are not kept: no space left on device\n"


def write_many(root, order):
    torch.set_num_threads(1)
    store = FeatureCache(root, 60_000, {})
    for name in order * 5:
        key = kept(store, name)
        store.flush()
        found = store.get(key)
        assert found is None or found.features.eq(1.0).all()  # whole or absent


def test_several_processes_share_a_folder(tmp_path):
    context = multiprocessing.get_context("fork")
    workers = [context.Process(target=write_many, args=(tmp_path, o)) for o in ("0123456789", "9876543210")]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert not list(tmp_path.glob("*/*.tmp"))
    assert sum(path.stat().st_size for path in tmp_path.glob("*/*")) <= 60_000


def test_a_second_run_encodes_nothing(tmp_path, folder):
    """Two runs of a sweep: the images that the first one saw, the second one finds; losses are the same."""
    records = tmp_path / "data"
    shutil.copytree(folder.root, records)
    record = conversation("2.png", action_turns("detection"), answer="teal", detection_images=["2.png"])
    for name in ("train.json", "test.json"):
        (records / name).write_text(json.dumps([record, conversation("0.png")]))
    config = compose_config(
        "+debug=two_steps", "data=vpt", f"data.root={records}", "optim.freeze=['*visual*','*vision*']",
        f"data.feature_cache={tmp_path / 'store'}", "data.workers=0",
    )  # fmt: skip
    calls = []
    for run in range(2):
        trainer = Trainer(config, tmp_path / f"run{run}")
        calls.append(count_calls(trainer.model.encoder("dino").vision))
        trainer.fit()
    assert calls[0] and not calls[1]
    assert losses(tmp_path / "run0") == pytest.approx(losses(tmp_path / "run1"), rel=1e-5)


def test_answers_of_a_second_run_encode_nothing(tmp_path, folder, monkeypatch):
    """Training, its evaluation and the final answers, which look again, find what the first run saw."""
    records = tmp_path / "data"
    shutil.copytree(folder.root, records)
    for name, image in (("train.json", "2.png"), ("test.json", "1.png")):
        record = conversation(image, action_turns("detection"), answer="teal", detection_images=[image])
        (records / name).write_text(json.dumps([record]))
    config = compose_config(
        "+debug=two_steps", "data=vpt", f"data.root={records}", "optim.freeze=['*visual*','*vision*']",
        f"data.feature_cache={tmp_path / 'store'}", "data.workers=0", "generation.action=dino",
    )  # fmt: skip
    seen, see = [], VPTModel._encode_uncached

    def noting(self, view, images):
        seen.append((view, len(images.uncached)))
        return see(self, view, images)

    monkeypatch.setattr(VPTModel, "_encode_uncached", noting)
    monkeypatch.setattr("vpt.cli.train.save_examples", lambda *_, **__: None)  # maps look for themselves
    images = []
    for run in range(2):
        train(config, tmp_path / f"run{run}")
        images.append({view: sum(fresh for name, fresh in seen if name == view) for view, _ in seen})
        seen.clear()
    assert min(images[0].values()) >= 2
    assert not any(images[1].values())


def test_what_is_frozen_stays_in_evaluation_mode(parts):
    """Dropout in a frozen encoder would make what is kept a matter of luck."""
    model = parts.model.train()
    assert not any(module.training for module in model.qwen.model.visual.modules())
    assert not any(module.training for module in model.encoder("dino").vision.modules())
    assert model.language.training
    assert model.encoder("dino").projector.training
    model.eval()
