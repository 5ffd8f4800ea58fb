"""The small parts: labels that are true of the pictures, a loop that resumes exactly, weights that are installed."""

from pathlib import Path

import numpy as np
import pytest
import torch

from vpt.checkpoint.load import build_model
from vpt.cli.pretrain import compose_pretrain, main
from vpt.config.weight_folder import ASSETS
from vpt.data.sources.scene_cells import CELLS
from vpt.data.sources.scene_rendering import COLOURS
from vpt.errors import CheckpointError, ConfigError
from vpt.pretraining import trainer
from vpt.pretraining.labels import ALL_COLOURS, CLASSES, OUTLINES, PLACES, mark
from vpt.pretraining.views import KINDS, Views

TINY = (
    "training.steps=4",
    "training.checkpoint_every=1",
    "patches.views={whole:1}",
    "patches.test_images=1",
    "threads=1",
)


@pytest.mark.parametrize("seed", range(4))
def test_patches_are_labelled_with_the_colours_that_the_picture_has_there(seed):
    view = Views("train").draw("whole", np.random.default_rng(seed))
    labels = view.labels(16)["colour"]
    pixels = np.asarray(view.image, dtype=float)
    seen = {}
    for name, rgb in COLOURS.items():  # the canvas is dark and grey: nothing else comes near a frame's colour
        near = np.abs(pixels - rgb).max(axis=2) < 40
        seen[name] = near.reshape(16, 14, 16, 14).sum(axis=(1, 3))
    for row, column in np.ndindex(16, 16):
        shown = max(seen, key=lambda name: seen[name][row, column])
        if seen[shown][row, column] >= 14:  # at least a line of a frame
            assert ALL_COLOURS[labels[row, column]] == shown
    assert (labels < len(ALL_COLOURS)).any()


def test_a_patch_shows_what_fills_enough_of_it():
    labels = np.full((4, 4), -9)
    mark(labels, (12, 25, 28, 45), (0, 0, 80, 80), 1)  # patches of 20 pixels; 12..28 lies in two, 25..45 mostly in one
    assert np.argwhere(labels == 1).tolist() == [[1, 0], [1, 1]]


def test_a_glance_tells_each_frame_where_it_stands():
    view = Views("train").draw("glance", np.random.default_rng(1))
    labels = view.labels(CELLS)
    pixels = np.asarray(view.image.resize((CELLS, CELLS)), dtype=float)
    framed = labels["colour"] < len(ALL_COLOURS)
    assert framed.any() and pixels[framed].max(axis=1).min() > pixels[~framed].mean()
    assert (labels["column"][5, 2], labels["row"][5, 2]) == (2, 5)


def test_all_patches_of_an_outline_tell_its_gaps():
    view = Views("train").draw("outlines", np.random.default_rng(1))
    labels, nothing = view.labels(32), len(OUTLINES["gaps"])
    assert ((labels["gaps"] < nothing) == (labels["colour"] < len(ALL_COLOURS))).all()
    cells = labels["gaps"].reshape(CELLS, 4, CELLS, 4).transpose(0, 2, 1, 3).reshape(-1, 16)
    assert all(len({*cell} - {nothing}) <= 1 for cell in cells.tolist()) and len(np.unique(cells)) == nothing + 1


def test_every_kind_of_view_has_labels_of_its_size():
    for kind in KINDS:
        for head, labels in Views("test").draw(kind, np.random.default_rng(0)).labels(4).items():
            assert labels.shape[:2] == (4, 4) and labels.max() <= len((CLASSES | PLACES | OUTLINES)[head])


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(tmp_path, monkeypatch):
    whole, draw = weights_after(tmp_path / "whole"), trainer.drawn

    def stop(config, views, step, counts):
        if step == 2:
            raise KeyboardInterrupt
        return draw(config, views, step, counts)

    monkeypatch.setattr(trainer, "drawn", stop)
    with pytest.raises(KeyboardInterrupt):
        weights_after(tmp_path / "cut")
    monkeypatch.setattr(trainer, "drawn", draw)
    again = weights_after(tmp_path / "cut")
    assert all(torch.equal(whole[name], again[name]) for name in whole)
    with pytest.raises(CheckpointError, match="optim"):
        weights_after(tmp_path / "cut", "optim.lr=1.0")


def weights_after(folder: Path, *overrides: str) -> dict[str, torch.Tensor]:
    """A DINO's weights after four steps."""
    small = "encoder.dino.sizes.small.config.num_hidden_layers=1"
    bundle, _ = trainer.pretrain_patches(compose_pretrain("dino", [*TINY, small, *overrides]), folder, build_model)
    return bundle.model.encoder("dino").vision.state_dict()


def test_what_does_not_exist_stops_the_run():
    for name, override, hint in (
        ("dyno", (), "dino"), ("dino", ("patches.viws={whole:1}",), "patches.views"), ("dino", ("patches.part=sam",), "tower or dino"),
    ):  # fmt: skip
        with pytest.raises(ConfigError, match=hint):
            compose_pretrain(name, override)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dino", "sam", "siglip"])
def test_a_part_made_anew_scores_as_its_card_says(name, tmp_path):
    main([name, f"output_dir={tmp_path}", f"to={tmp_path / name}"])
    made, kept = (card_scores(folder / name) for folder in (tmp_path, ASSETS))
    assert made.keys() == kept.keys() and all(abs(made[key] - kept[key]) < 0.03 for key in kept)


def card_scores(folder: Path) -> dict[str, float]:
    """The figures on a card."""
    lines = (folder / "README.md").read_text().splitlines()
    rows = [line.strip("| ").split(" | ") for line in lines if line.startswith("| ") and line[2:3].isalpha()]
    return {name: float(score) for name, score in (row for row in rows if len(row) == 2 and row[1][:1].isdigit())}
