"""Regions in the cells of another grid, and as text."""

import json

import numpy as np
import pytest
from PIL import Image

from conftest import compose_config, conversation, samples_of
from vpt.__main__ import main
from vpt.data.build import build_sources
from vpt.data.records import ImageRef
from vpt.errors import DataError
from vpt.perception.regions import Region, in_numbers

SIZE, BOX = (200, 100), [37, 21, 90.5, 60]


@pytest.fixture
def files(tmp_path):
    """A folder with an image, a Visual-CoT file, and the records it becomes."""
    pixels = np.random.default_rng(0).integers(0, 255, (SIZE[1], SIZE[0], 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    raw = {"question": "what?", "answer": "a cat", "image": "a.png", "width": 200, "height": 100, "bboxs": [BOX]}
    (tmp_path / "cot.jsonl").write_text(json.dumps(raw))
    return tmp_path


def record(folder, *overrides: str, name: str = "train.jsonl"):
    config = compose_config("data=vpt", f"data.root={folder}", f"data.train.vpt.options.path={name}", *overrides)
    return build_sources(config.data.train, config, split="train")[0][0][0]


@pytest.mark.parametrize("written", [4, 8, 1000])
@pytest.mark.parametrize("spelling", ["tokens", "text"])
@pytest.mark.parametrize("bins", [4, 8, 16, 32, 1000])
def test_one_conversion_serves_every_grid(files, written, spelling, bins):
    """Whatever grid the file was written for, the region is that of the box in the model's grid."""
    main(
        [
            "convert",
            str(files / "cot.jsonl"),
            str(files / "train.jsonl"),
            "--bins",
            str(written),
            "--region-format",
            spelling,
        ]
    )
    region = Region.from_box(tuple(BOX), SIZE, bins=bins)
    found = record(files, f"model.region_bins={bins}")
    assert found.messages[2].content == region.to_text()
    assert found.images["image"][1] == ImageRef("a.png", region.to_box(SIZE, bins=bins))
    assert found.box == tuple(BOX)


@pytest.mark.parametrize("bins", [4, 8, 16])
def test_a_margin_is_kept_in_every_grid(files, bins):
    main(["convert", str(files / "cot.jsonl"), str(files / "train.jsonl"), "--crop-margin", "1"])
    region, found = Region.from_box(tuple(BOX), SIZE, bins=bins), record(files, f"model.region_bins={bins}")
    assert found.messages[2].content == region.to_text()
    assert found.images["image"][1] == ImageRef("a.png", region.to_box(SIZE, bins=bins, margin=1))


def test_published_files_hold_cells_alone(files):
    """8x8 cells join to 4x4 or 2x2 exactly, as if they had been made from the box; they do not split."""
    fine = Region.from_box(tuple(BOX), SIZE, bins=8)
    said = [{"role": "assistant", "content": fine.to_text()}, {"role": "user", "content": "<image>"}]
    crop = ",".join(map(str, fine.to_box(SIZE, bins=8)))
    raw = conversation("a.png", said)
    raw["images"].append(f"a.png_{crop}")
    (files / "train.jsonl").write_text(json.dumps(raw))
    assert record(files).messages[2].content == fine.to_text()
    for bins in (4, 2):
        coarse = Region.from_box(tuple(BOX), SIZE, bins=bins)
        found = record(files, f"model.region_bins={bins}")
        assert found.messages[2].content == coarse.to_text()
        assert found.images["image"][1].crop == coarse.to_box(SIZE, bins=bins)
    with pytest.raises(DataError, match=r"8x8, the model's of 16x16, and cells cannot be split; convert from boxes"):
        record(files, "model.region_bins=16")
    with pytest.raises(DataError, match=r"model.region_bins=0 knows none; type model.region_bins=8"):
        record(files, "model.region_bins=0")
    assert record(files, "model.region_bins=0", "data.perception=false").messages[2].content == "yes"


def test_wrong_evidence(files):
    raw = conversation("a.png")
    wrong = (("region_bins", "8", "whole"), ("crop_margin", -1, "whole number"), ("box", [1, 2, 0, 4], "x0 < x1"))
    for key, value, message in wrong:
        (files / "train.jsonl").write_text(json.dumps({**raw, key: value}))
        with pytest.raises(DataError, match=rf"train.jsonl:1: `{key}` must be .*{message}"):
            record(files)


def test_several_files_are_one_source(files):
    for name in ("b.json", "c.json"):
        (files / name).write_text(json.dumps([conversation("a.png", answer=name)] * 2))
    config = compose_config("data=vpt", f"data.root={files}", "data.train.vpt.options.path=[b.json,c.json]")
    source = build_sources(config.data.train, config, split="train")[0][0]
    assert [source[i].answer for i in range(len(source))] == ["b.json", "b.json", "c.json", "c.json"]
    config.data.train["vpt"].options["first"] = 3
    assert len(build_sources(config.data.train, config, split="train")[0][0]) == 3


def test_numbers():
    region = Region(12, 30, 400, 999)
    assert region.to_numbers() == "[12, 30, 400, 999]"
    assert [found for _, found in Region.find("at [400,999, 12, 30], [1, 2, 3, 4]", numbers=True)] == [
        region, Region(1, 2, 3, 4),
    ]  # fmt: skip
    assert not Region.find("[1, 2, 3] [-1, 2, 3, 4]", numbers=True)
    assert in_numbers(f"a {region.to_text()} b") == "a [12, 30, 400, 999] b"


def test_text_needs_no_tokens_and_carries_loss(make_parts, folder):
    """With `region_format=text` the vocabulary has no region tokens, and the numbers are learned like any text."""
    parts = make_parts("encoder=[]", "model.region_bins=1000", "model.region_format=text")
    assert not any(token.startswith(("<|x_", "<|region")) for token in parts.tokenizer.get_vocab())
    region = Region(125, 250, 749, 874)
    said = [{"role": "assistant", "content": region.to_text()}, {"role": "user", "content": "<image>"}]
    raw = conversation("1.png", said)
    raw["images"].append("1.png_12,12,72,42")
    sample = samples_of(parts, folder, [raw])[0]
    learned = parts.tokenizer.decode(sample.labels[sample.labels != -100])
    assert learned == "[125, 250, 749, 874]<|im_end|>yes<|im_end|>"
