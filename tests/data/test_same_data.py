"""The same data without perception, and with the image once more in as many tokens."""

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conftest import ALL, REGION_TURNS, TOKENS, action_turns, compose_config, conversation
from vpt.data.build import build_sources
from vpt.data.collate import collate
from vpt.data.records import REENCODE_PROMPT, ImageRef, parse_record
from vpt.data.same_data import TokenMatchedImage, without_perception, without_prompts
from vpt.encoders.transforms import nearest_grid
from vpt.errors import ConfigError, DataError
from vpt.perception.batch import VISION_TOWER


def said(*turns: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(turns)]


def record_of(raw: dict):
    return parse_record(raw, where="record", encoder_tokens=TOKENS)


def contents(record) -> list[str]:
    return [message.content for message in record.messages[1:]]


def long_record() -> dict:
    """Two questions; the first needs a region and DINO, and the second image is a question of its own."""
    region, _, dino, _ = [turn["content"] for turn in (*REGION_TURNS, *action_turns("detection"))]
    turns = said(
        f"<image>\nwhat? {REENCODE_PROMPT}", region, "<image>", dino, "<detection_image>", "red", "<image>", "and blue"
    )
    images = ["1.png", "1.png_12,12,72,42", "2.png"]
    return {"messages": turns, "images": images, "detection_images": ["1.png"]}


def test_only_perception_goes():
    """Every other turn stays, also an image that nobody asked for; prompts go."""
    record = without_perception(record_of(long_record()), TOKENS)
    assert contents(record) == ["<image>\nwhat?", "red", "<image>", "and blue"]
    assert record.images == {VISION_TOWER: (ImageRef("1.png"), ImageRef("2.png"))}
    spelt = long_record()
    spelt["messages"][1]["content"] = "[1, 2, 5, 6]"
    assert without_perception(record_of(spelt), TOKENS) == record
    plain = record_of({"messages": said("hello", "hi", "[1, 2, 3, 4]?", "[1, 2, 3, 4]"), "images": []})
    assert without_perception(plain, TOKENS) == plain


def test_free_choice_keeps_all_but_the_prompt():
    record = without_prompts(record_of(long_record()))
    assert contents(record)[0] == "<image>\nwhat?"
    assert contents(record)[1:] == contents(record_of(long_record()))[1:]


def test_an_image_that_nothing_asked_for():
    turns = said("<image>\nwhat?", "one moment", "<detection_image>\nwell?", "red")
    record = record_of({"messages": turns, "images": ["1.png"], "detection_images": ["1.png"]})
    with pytest.raises(DataError, match="record: message 3 shows a re-encoded image that nothing asked for"):
        without_perception(record, TOKENS)


@pytest.mark.parametrize("matched", [False, True])
def test_words_beside_perception_stay(matched):
    """Of both turns, joined to the words of the same speaker; the requests and their images go."""
    region, dino = REGION_TURNS[0]["content"], action_turns("detection")[0]["content"]
    turns = said(
        "<image>\nwhat?", f"At the left. {region}", "<image>\nNow look.", f"It is small. {dino}", "<detection_image>",
        "red",
    )  # fmt: skip
    raw = {"messages": turns, "images": ["1.png", "1.png_12,12,72,42"], "detection_images": ["1.png"]}
    record = without_perception(record_of(raw), TOKENS, token_matched_images=matched)
    if matched:
        assert contents(record) == [
            "<image>\nwhat?", "At the left.", "<image>\nNow look.", "It is small.", "<image>", "red",
        ]  # fmt: skip
    else:
        assert contents(record) == ["<image>\nwhat?", "At the left.", "Now look.", "It is small. red"]
    assert [type(shown) for shown in record.images[VISION_TOWER]] == [ImageRef, *[TokenMatchedImage] * (2 * matched)]
    assert record.answer == "red"


@pytest.mark.parametrize(
    ("shown", "asked", "said_of_it"),
    [
        ("<detection_<detection_image>image>", "", "detection_image"),
        ("<detection_image>", "<|detection_action_start|>", "message 2 requests"),
    ],
)
def test_what_is_cut_out_joins_nothing_into_perception(shown, asked, said_of_it):
    """Text around a request or a placeholder that spells another one without it is refused by name."""
    dino = action_turns("detection")[0]["content"]
    around = f"{asked[:9]}{dino}{asked[9:]}"
    raw = {"messages": said("<image>\nwhat?", around, shown, "red"), "images": ["1.png"], "detection_images": ["1.png"]}
    with pytest.raises(DataError, match=f"record: .*{said_of_it}"):
        without_perception(record_of(raw), TOKENS)


def test_a_token_matched_image_takes_the_place_of_each_perception():
    record = without_perception(record_of(long_record()), TOKENS, token_matched_images=True)
    assert contents(record) == ["<image>\nwhat?\n<image>\n<image>", "red", "<image>", "and blue"]
    crop = ImageRef("1.png", (12, 12, 72, 42))
    assert record.images[VISION_TOWER] == (
        ImageRef("1.png"),
        TokenMatchedImage("1.png", source=VISION_TOWER, like=crop),
        TokenMatchedImage("1.png", source="dino", like=ImageRef("1.png")),
        ImageRef("2.png"),
    )


@pytest.mark.parametrize("image", ["0.png", "1.png", "2.png", "3.png"])
def test_token_matched_images_have_as_many_tokens(make_parts, folder, image):
    """Through the whole path, to the blocks of a batch: 64x64, 96x48, 80x112 and 200x150 pixels."""
    parts = make_parts(*ALL)
    with_all = conversation(
        image, action_turns("detection"), action_turns("seg"), action_turns("clip"), REGION_TURNS,
        detection_images=[image], seg_images=[image], clip_images=[image],
    )  # fmt: skip
    with_all["images"].append(f"{image}_8,8,40,30")
    treated = parts.processor.encode_conversation(record_of(with_all), folder)
    plain = without_perception(record_of(with_all), TOKENS, token_matched_images=True)
    control = parts.processor.encode_conversation(plain, folder)
    wanted = [block.length for block in treated.row.blocks]
    found = [block.length for block in control.row.blocks]
    assert {block.source for block in control.row.blocks} == {VISION_TOWER} and not control.row.actions
    assert len(found) == len(wanted) and found[0] == wanted[0]
    assert all(abs(a - b) <= 0.13 * b for a, b in zip(found, wanted, strict=True)), (found, wanted)
    if image == "0.png":
        assert found[:4] == wanted[:4]  # a square comes out even
    assert parts.model(collate([control])).loss_sum > 0
    prompt = parts.processor.encode_prompt(plain, folder)  # what it is asked when it is tested
    assert [block.length for block in prompt.row.blocks] == found


@given(st.integers(4, 1280), st.integers(28, 4000), st.integers(28, 4000))
def test_the_nearest_grid(tokens, width, height):
    columns, rows = nearest_grid((width, height), tokens)
    exact = (tokens * width / height) ** 0.5, (tokens * height / width) ** 0.5
    assert abs(columns - exact[0]) <= 1 and abs(rows - exact[1]) <= 1
    # the grid of rounded sides is among those to choose from
    rounded = max(round(exact[0]), 1) * max(round(exact[1]), 1)
    assert abs(columns * rows - tokens) <= abs(rounded - tokens)


def test_the_published_sizes_come_out_near():
    """256 tokens of DINO or SAM at usual proportions."""
    sizes = [(512, 512), (512, 384), (384, 512), (512, 341), (512, 288), (400, 512)]
    counts = [columns * rows for columns, rows in (nearest_grid(size, 256) for size in sizes)]
    assert counts == [256, 252, 252, 260, 252, 252]


def test_easy_vqa_and_files_alike(folder, tmp_path):
    """`data.perception=false` with and without token-matched images, through both sources."""
    for image in Path(folder.root).iterdir():
        shutil.copy(image, tmp_path)
    raw = conversation("1.png", action_turns("detection"), detection_images=["1.png"])
    for name in ("train", "test"):
        (tmp_path / f"{name}.json").write_text(json.dumps([raw]))
    actions = "data.actions={none:0,dino:1}"
    matched = ("data.perception=false", "data.token_matched_images=true")
    for overrides in (("data=vpt", f"data.root={tmp_path}"), (actions,)):
        treated, plain, looking = [
            build_sources(config.data.test, config, split="test")[0][0][0]
            for config in (compose_config(*overrides, *more) for more in ((), matched[:1], matched))
        ]
        assert treated.images.keys() == {VISION_TOWER, "dino"} and plain.images.keys() == {VISION_TOWER}
        assert treated.answer == plain.answer == looking.answer and treated.question == plain.question
        assert [type(image) for image in looking.images[VISION_TOWER]] == [ImageRef, TokenMatchedImage]
        assert len(plain.messages) == len(looking.messages) == 3
    config = compose_config("data=vpt", f"data.root={tmp_path}", *matched, "encoder=[]")
    with pytest.raises(DataError, match=r"needs a re-encoder spelt 'detection'.*encoder=\[...\]"):
        _ = build_sources(config.data.test, config, split="test")[0][0][0]
    with pytest.raises(ConfigError, match=r"data\.perception=false"):
        compose_config("data.token_matched_images=true")
