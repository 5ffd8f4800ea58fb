"""Visual-CoT records to VPT records: both layouts, every kind of perception, every way to be wrong, and real ones."""

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from helpers.visual_cot_records import METADATA, VISCOT, benchmark, metadata, real
from vpt.data.records import REENCODE_PROMPT, REGION_PROMPT, ImageRef, parse_record
from vpt.data.visual_cot.boxes import image_sizes
from vpt.data.visual_cot.records import convert_record
from vpt.errors import DataError
from vpt.perception.regions import Box, Region


def region_of(record: dict[str, Any]) -> Region:
    region = Region.find(record["messages"][1]["content"])[0][1]
    assert region is not None
    return region


def crop_of(record: dict[str, Any]) -> tuple[int, int, int, int]:
    crop = ImageRef.parse(record["images"][1]).crop
    assert crop is not None
    return crop


def assert_holds(crop: tuple[int, int, int, int], box: Box) -> None:
    """Cell borders are cut to whole pixels, so a crop holds a box in whole pixels."""
    near, far = (int(box[0]), int(box[1])), (int(box[2]), int(box[3]))
    assert all(a <= b for a, b in zip(crop[:2], near, strict=True)), (crop, box)
    assert all(a >= b for a, b in zip(crop[2:], far, strict=True)), (crop, box)


def assert_inside(crop: tuple[int, int, int, int], size: tuple[int, int]) -> None:
    """What loading an image with a crop demands."""
    assert 0 <= crop[0] < crop[2] <= size[0], (crop, size)
    assert 0 <= crop[1] < crop[3] <= size[1], (crop, size)


def contents(record: dict[str, Any]) -> list[str]:
    return [message["content"] for message in record["messages"]]


def test_region_of_metadata() -> None:
    record = convert_record(metadata(), prefix="cot/vsr")
    assert contents(record) == [
        f"<image>\nWhat is left? {REGION_PROMPT}",
        "<|region_token_start|><|x_1|><|y_1|><|x_3|><|y_2|><|region_token_end|>", "<image>", "A cat",
    ]  # fmt: skip
    assert record["images"] == ["cot/vsr/a.jpg", "cot/vsr/a.jpg_10,20,40,60"]
    assert record["detection_images"] == record["clip_images"] == record["seg_images"] == []
    assert record["dataset"] == "vsr"
    assert "question_id" not in record


@pytest.mark.parametrize("kind", ["detection", "seg", "clip", "siglip"])
def test_reencoding(kind: str) -> None:
    record = convert_record(metadata(), kind=kind)
    turns = [f"<|{kind}_action_start|><|{kind}_action|><|{kind}_action_end|>", f"<{kind}_image>"]
    assert contents(record) == [f"<image>\nWhat is left? {REENCODE_PROMPT}", *turns, "A cat"]
    assert record["images"] == record[f"{kind}_images"] == ["a.jpg"]
    assert parse_record(record, where="", encoder_tokens={"mine": kind}).images["mine"] == (ImageRef("a.jpg"),)


def test_none_and_free_choice() -> None:
    assert contents(convert_record(metadata(), kind="none")) == ["<image>\nWhat is left?", "A cat"]
    for kind in ("region", "detection"):
        assert contents(convert_record(metadata(), kind=kind, action_prompt=False))[0] == "<image>\nWhat is left?"


def test_only_regions_need_a_box() -> None:
    for kind in ("none", "seg"):
        convert_record(metadata(bboxs=None, width=None, height=None), kind=kind)


def test_several_boxes_are_united() -> None:
    several = convert_record(metadata(bboxs=[[12.5, 30, 20, 59.5], [15, 25, 31, 40]]))
    assert several == convert_record(metadata())


def test_crop_margin_widens_the_crop_only() -> None:
    narrow, wide = convert_record(metadata()), convert_record(metadata(), crop_margin=1)
    assert region_of(narrow) == region_of(wide)
    assert (crop_of(narrow), crop_of(wide)) == ((10, 20, 40, 60), (0, 0, 50, 80))


def test_bins() -> None:
    record = convert_record(metadata(), bins=16)
    assert (region_of(record), crop_of(record)) == (Region(2, 2, 6, 5), (10, 20, 35, 60))


def test_slight_overhang_is_clipped() -> None:
    notes: Counter[str] = Counter()
    record = convert_record(metadata(bboxs=[[-1.5, 0, 81, 162]]), notes=notes)
    assert (crop_of(record), notes["clipped"]) == ((0, 0, 80, 160), 1)
    convert_record(metadata(), notes=notes)
    assert notes["clipped"] == 1


@pytest.mark.parametrize("bins", [1, 8, 13])
def test_crop_holds_the_box(bins: int) -> None:
    draw = random.Random(0)
    for _ in range(300):
        size = draw.randint(20, 700), draw.randint(20, 700)
        (x0, x1), (y0, y1) = (sorted(draw.uniform(0, extent) for _ in range(2)) for extent in size)
        record = convert_record(metadata(width=size[0], height=size[1], bboxs=[[x0, y0, x1, y1]]), bins=bins)
        assert_holds(crop_of(record), (x0, y0, x1, y1))
        assert_inside(crop_of(record), size)


@pytest.mark.parametrize("size", [(640, 480), (427, 640), (500, 500), (333, 500), (1023, 768), (4961, 7016)])
def test_size_from_both_spellings(size: tuple[int, int]) -> None:
    """The true size is always among those found, and a crop never leaves the true image."""
    draw = random.Random(1)
    for _ in range(50):
        (x0, x1), (y0, y1) = (sorted(draw.uniform(0, extent) for _ in range(2)) for extent in size)
        if min(x1 - x0, y1 - y0) < 8:
            continue
        raw, box = benchmark((x0, y0, x1, y1), size), (x0, y0, x1, y1)
        pixels = json.loads(raw["image"][1].partition("###")[2])
        sizes, padded = image_sizes(tuple(pixels), tuple(json.loads(raw["conversations"][1]["value"])))
        assert padded
        assert size in sizes
        notes: Counter[str] = Counter()
        record = convert_record(raw, notes=notes)
        assert_holds(crop_of(record), box)
        assert_inside(crop_of(record), size)
        if not notes["unsure"]:
            assert region_of(record) == Region.from_box(box, size, bins=8)


def test_benchmark_record() -> None:
    record = convert_record(benchmark((100.4, 50.2, 300.9, 400.1), (640, 480)))
    assert contents(record)[::3] == [f"<image>\nWhat is left? {REGION_PROMPT}", "A cat"]
    assert (record["images"][0], record["question_id"]) == ("cot/a.jpg", 7)
    assert contents(convert_record(benchmark((1, 2, 30, 40), (64, 48)), kind="none")) == [
        "<image>\nWhat is left?",
        "A cat",
    ]


def test_benchmark_pixels_may_be_floats() -> None:
    raw = benchmark((100.4, 50.2, 300.9, 400.1), (640, 480))
    floats = raw | {"image": ["cot/a.jpg", "cot/a.jpg###[100.4, 50.2, 300.9, 400.1]"]}
    assert convert_record(floats) == convert_record(raw)


def test_unpadded_fractions_give_their_cells() -> None:
    """Fractions of the image itself, where the padded square fits no size."""
    raw = benchmark((100.4, 50.2, 300.9, 400.1), (640, 480), padded=False)
    fractions = json.loads(raw["conversations"][1]["value"])
    assert region_of(convert_record(raw)) == Region.from_box(tuple(fractions), (1, 1), bins=8)


@pytest.mark.parametrize(
    ("pixels", "fractions", "crop"),
    [  # of real records: boxes that count from 1
        ([413, 271, 501, 305], [0.826, 0.718, 1.002, 0.786], (375, 242, 500, 323)),
        ([1, 3, 501, 281], [0.002, 0.224, 1.002, 0.780], (0, 0, 500, 281)),
        ([23, 12, 321, 345], [0.119, 0.033, 0.947, 0.958], (0, 0, 320, 360)),
    ],
)
def test_a_box_of_whole_pixels_that_leaves_its_image(pixels: list, fractions: list, crop: tuple) -> None:
    raw, notes = benchmark((1, 2, 30, 40), (64, 48)), Counter[str]()
    raw["image"][1], raw["conversations"][1]["value"] = f"cot/a.jpg###{pixels}", str(fractions)
    record = convert_record(raw, notes=notes)
    assert (crop_of(record), notes["clipped"]) == (crop, 1)


@pytest.mark.parametrize(("width", "height"), [(640, 480), (333, 500), (201, 200)])
def test_boxes_from_1_to_the_last_pixel(tmp_path: Path, width: int, height: int) -> None:
    """They end a pixel beyond the image, and so may crops, which the reader clips; with the image at hand none does."""
    Image.new("RGB", (width, height)).save(tmp_path / "a.png")
    draw, exact = random.Random(2), 0
    for _ in range(60):
        box = draw.randint(1, width // 2), draw.randint(1, height // 2), width + 1, height + draw.randint(0, 1)
        raw = benchmark(box, (width, height))
        raw["image"] = [path.replace("cot/a.jpg", "a.png") for path in raw["image"]]
        assert_inside(crop_of(convert_record(raw)), (width + width % 2, height + height % 2))
        record = convert_record(raw, images=tmp_path)
        region = Region.from_box((*box[:2], min(box[2], width), min(box[3], height)), (width, height), bins=8)
        assert record["image_size"] == [width, height]
        assert max(abs(a - b) for a, b in zip(vars(region).values(), vars(region_of(record)).values())) <= 1
        assert crop_of(record) == region_of(record).to_box((width, height), bins=8)
        exact += region_of(record) == region
    assert exact > 55


def test_sizes_are_kept_and_checked(tmp_path: Path) -> None:
    assert convert_record(metadata())["image_size"] == [80, 160]
    assert "image_size" not in convert_record(benchmark((1, 2, 30, 40), (64, 48)))  # exact to a pixel or two only
    (tmp_path / "cot").mkdir()
    Image.new("RGB", (64, 48)).save(tmp_path / "cot" / "a.jpg")
    assert convert_record(benchmark((1, 2, 30, 40), (64, 48)), images=tmp_path)["image_size"] == [64, 48]
    with pytest.raises(DataError, match=r"in.jsonl:3: .*not of an image of 64x48 pixels"):
        convert_record(benchmark((1, 2, 60, 40), (128, 96)), "in.jsonl:3", images=tmp_path)
    with pytest.raises(DataError, match=r"in.jsonl:3: the image has \(64, 48\) pixels, .* say \(80, 160\)"):
        convert_record(metadata(image="cot/a.jpg"), "in.jsonl:3", images=tmp_path)
    with pytest.raises(DataError, match=r"in.jsonl:3: file .*b.jpg does not exist"):
        convert_record(metadata(image="b.jpg"), "in.jsonl:3", images=tmp_path)


@pytest.mark.parametrize(
    ("prefix", "path", "joined"),
    [
        ("cot/docvqa", "cot/docvqa/1.png", "cot/docvqa/1.png"),
        ("./cot/docvqa/", "cot/docvqa/1.png", "cot/docvqa/1.png"),
        ("data/cot/docvqa", "cot/docvqa/1.png", "data/cot/docvqa/1.png"),
        ("data", "cot/docvqa/1.png", "data/cot/docvqa/1.png"),
        ("cot/docvqa", "1.png", "cot/docvqa/1.png"),
        ("cot", "cotton/1.png", "cot/cotton/1.png"),
        ("", "cot/docvqa/1.png", "cot/docvqa/1.png"),
    ],
)
def test_a_prefix_is_not_doubled(prefix: str, path: str, joined: str) -> None:
    record = convert_record(metadata(image=path), prefix=prefix)
    assert record["images"] == [joined, f"{joined}_10,20,40,60"]


def test_benchmark_overhang() -> None:
    notes: Counter[str] = Counter()
    record = convert_record(benchmark((100.4, 50.2, 641.9, 400.1), (640, 480)), notes=notes)
    assert (notes["clipped"], region_of(record)) == (1, Region(1, 0, 7, 6))
    assert region_of(convert_record(benchmark((-1.9, 50.2, 333.3, 400.1), (640, 480)))) == Region(0, 0, 4, 6)


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        ([1], "an object"),
        (metadata(answer=None), "key `answer` is missing"),
        (metadata(width=None), "key `width` is missing"),
        (metadata(width="80"), "`width` must be of type int"),
        (metadata(width=True), "`width` must be of type int"),
        (metadata(height=0), "80x0"),
        (metadata(question=" "), "`question` is empty"),
        (metadata(bboxs=[]), "`bboxs` is empty"),
        (metadata(bboxs=[[1, 2, 3]]), "four numbers"),
        (metadata(bboxs=[[1, 2, float("nan"), 4]]), "four numbers"),
        (metadata(bboxs=[[10, 20, 10, 30]]), r"\[10, 20, 10, 30\] in an image of 80x160 pixels has no area"),
        (metadata(bboxs=[[30, 20, 10, 30]]), "no area"),
        (metadata(bboxs=[[81, 20, 82, 30]]), "no area"),
        (metadata(bboxs=[[0, 0, 82.5, 30]]), r"\[0, 0, 82.5, 30\] in an image of 80x160 pixels leaves it by 2.5"),
        (metadata(image="/a.jpg"), "leaves data.root"),
        (metadata(question="What <image> is it?"), "3 placeholder"),
        ({"conversations": []}, "must hold 4 turns"),
        (benchmark((1, 2, 30, 40), (64, 48)) | {"image": ["a.jpg"]}, "`image` must be"),
        (benchmark((1, 2, 30, 40), (64, 48)) | {"image": ["a.jpg", "b.jpg###[1, 2, 3, 4]"]}, "`image` must be"),
        (benchmark((1, 2, 30, 40), (64, 48)) | {"image": ["a.jpg", "a.jpg###[1, 2"]}, "four numbers"),
        (benchmark((1, 2, 30, 40), (64, 48)) | {"image": ["a.jpg", "a.jpg###[9, 2, 30, 4]"]}, "no image size agrees"),
        (benchmark((0, 0, 3, 40), (5000, 5000)), "too many do"),
    ],
)
def test_wrong_records(raw: Any, words: str) -> None:
    with pytest.raises(DataError, match=f"^in.jsonl:3: .*{words}"):
        convert_record(raw, "in.jsonl:3")


@real
@pytest.mark.parametrize("name", METADATA)
def test_real_crops_hold_their_boxes(name: str) -> None:
    for raw in map(json.loads, (VISCOT / name).open()):
        assert_holds(crop_of(convert_record(raw)), raw["bboxs"][0])


@real
def test_benchmark_agrees_with_metadata() -> None:
    """146 benchmark records have their image and box in the metadata too, where the size is known: same cells."""
    known = {}
    for raw in map(json.loads, (VISCOT / "vsr_cot_train.jsonl").open()):
        known[raw["image"], str([int(v) for v in raw["bboxs"][0]])] = raw
    compared, notes = 0, Counter[str]()
    for raw in json.loads((VISCOT / "vsr_benchmark.json").read_text()):
        path, listed = raw["image"][1].split("###")
        record = convert_record(raw, notes=notes)
        assert_holds(crop_of(record), tuple(json.loads(listed)))
        twin = known.get((path.rsplit("/", 1)[1], listed))
        if twin is not None:
            compared += 1
            there, here = convert_record(twin), record
            assert region_of(here) == region_of(there)
            assert max(abs(a - b) for a, b in zip(crop_of(here), crop_of(there), strict=True)) <= 4
            assert_inside(crop_of(here), (twin["width"], twin["height"]))
    assert (compared, notes["unsure"]) == (146, 13)
