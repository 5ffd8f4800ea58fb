"""Edges of record files: keys that are null, limits of the run, re-encoders that other files name."""

import json

import pytest
from PIL import ExifTags, Image

from conftest import TOKENS, action_turns, compose_config, conversation
from vpt.data.build import build_sources, media_store
from vpt.data.images import MediaStore
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import ConfigError, DataError

REGION = "<|region_token_start|><|x_0|><|y_0|><|x_3|><|y_3|><|region_token_end|>"


def source_of(folder, raw: dict, *, bins: int = 8, tokens=TOKENS, **options) -> RecordFile:
    (folder / "a.jsonl").write_text(json.dumps(raw))
    return RecordFile(SourceContext(folder, tokens, {}, True, True, bins, 0), path="a.jsonl", **options)


def cropped(**changes) -> dict:
    """A record whose region is the upper left quarter of an image of 80x40, in a grid of 8x8 cells."""
    raw = conversation("a.png", [{"role": "assistant", "content": REGION}, {"role": "user", "content": "<image>"}])
    raw["images"].append("a.png_0,0,40,20")
    return {**raw, **changes}


@pytest.fixture
def root(tmp_path):
    Image.new("RGB", (80, 40)).save(tmp_path / "a.png")
    return tmp_path


def test_a_null_is_no_value(root):
    """As Parquet has it where other files leave a key out."""
    nulls = dict.fromkeys(["region_bins", "crop_margin", "dataset", "box", "answers", "image_size"])
    record = source_of(root, cropped(**nulls))[0]
    assert record == source_of(root, cropped())[0] and record.question_type == "all"


def test_a_system_prompt_alone_is_refused(root):
    with pytest.raises(DataError, match="the last turn must be the assistant's answer"):
        source_of(root, {"messages": [{"role": "system", "content": "x"}]})[0]


def test_crops_are_checked_against_the_image_as_the_run_opens_it(root):
    """Turned by its EXIF data, and as large as the run allows."""
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = 6
    Image.new("RGB", (40, 80)).save(root / "a.jpg", exif=exif)  # 80 x 40 as viewers show it
    raw = cropped(images=["a.jpg", "a.jpg_0,0,40,20"])
    (root / "train.json").write_text(json.dumps([raw]))

    def first(*overrides: str):
        config = compose_config("+experiment=region", "data=vpt", f"data.root={root}", *overrides)
        [source], _ = build_sources(config.data.train, config, split="train")
        return source[0].images["image"][1]

    assert first("data.image.apply_exif_rotation=true").crop == (0, 0, 40, 20)
    with pytest.raises(DataError, match=r"data\.image\.max_file_pixels"):
        first("data.image.apply_exif_rotation=true", "data.image.max_file_pixels=3199")


def test_what_a_record_costs_is_known_without_its_images(tmp_path):
    source = source_of(tmp_path, cropped())
    assert len(source.draft(0).images["image"]) == 2
    with pytest.raises(DataError, match=r"a\.png does not exist"):
        source[0]


@pytest.mark.parametrize(("serving", "message"), [("sma", "did you mean sam"), ("clip", None)])
def test_the_re_encoder_that_serves_is_one_of_the_model(root, serving, message):
    raw = conversation("a.png", action_turns("detection"), detection_images=["a.png"])
    if message is None:
        assert "clip" in source_of(root, raw, reencode_as=serving)[0].images
        return
    with pytest.raises(ValueError, match=message):
        source_of(root, raw, reencode_as=serving)


def test_one_re_encoder_cannot_serve_for_two(root):
    both = [*action_turns("detection"), *action_turns("seg")]
    raw = conversation("a.png", both, detection_images=["a.png"], seg_images=["a.png"])
    assert {"dino", "sam"} < source_of(root, raw)[0].images.keys()
    with pytest.raises(DataError, match="this one names detection, seg"):
        source_of(root, raw, reencode_as="clip")[0]


def test_options_out_of_range(root):
    with pytest.raises(ValueError, match="first=0 leaves no record"):
        source_of(root, cropped(), first=0)
    config = compose_config("data.train.easy_vqa.options.turns=9", "data=easy_vqa")
    with pytest.raises(ConfigError, match="turns=9 must be from 1 to 8"):
        build_sources(config.data.train, config, split="train")


def test_a_run_hands_its_limits_to_its_images(root):
    config = compose_config("data=vpt", f"data.root={root}", "data.image.max_side=30", "data.image.crop_max_side=20")
    store = media_store(root, config.data)
    assert isinstance(store, MediaStore) and (store.max_side, store.crop_max_side) == (30, 20)
