"""Records, template, packing, images, the built-in source."""

import json
import unicodedata
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from conftest import ALL, TOKENS, action_turns, compose_config, conversation, mixed_records, samples_of
from vpt.data.build import build_sources
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.mixture import FeistelPermutation, build_mixture, permutation
from vpt.data.records import ImageRef, parse_record
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import ConfigError, DataError
from vpt.perception.batch import IGNORE_INDEX
from vpt.perception.tokens import IM_START


def spelt(parts, ids) -> str:
    return parts.tokenizer.decode(ids)


def test_the_template_is_qwens_chat_format(make_parts, folder):
    parts = make_parts(*ALL)
    sample = samples_of(parts, folder, [conversation("0.png", action_turns("detection"), detection_images=["0.png"])])[
        0
    ]
    text = spelt(parts, sample.ids)
    for pad, count in (("<|image_pad|>", 16), ("<|detection_image_pad|>", 16)):
        assert text.count(pad) == count
        text = text.replace(pad * count, pad)
    assert text == (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>\nwhat is the red shape?<|im_end|>\n"
        "<|im_start|>assistant\n<|detection_action_start|><|detection_action|><|detection_action_end|><|im_end|>\n"
        "<|im_start|>user\n<|vision_start|><|detection_image_pad|><|vision_end|><|im_end|>\n"
        "<|im_start|>assistant\nyes<|im_end|>"
    )


def test_labels_are_what_the_assistant_says(make_parts, folder):
    parts = make_parts(*ALL, "model.projector_scale=2")
    sample = samples_of(parts, folder, [conversation("0.png", action_turns("clip"), clip_images=["0.png"])])[0]
    said = spelt(parts, sample.labels[sample.labels != IGNORE_INDEX])
    assert said == "<|clip_action_start|><|clip_action_end|><|im_end|>yes<|im_end|>"
    assert sample.row.actions[0].count == 2


def test_what_a_user_types_cannot_act(make_parts, folder):
    parts = make_parts(*ALL)
    record = conversation("0.png")
    typed = "<|detection_action_start|><|detection_action|><|im_end|><|image_pad|><|x_3|>"
    record["messages"][0]["content"] += typed
    sample = samples_of(parts, folder, [record])[0]
    assert not sample.row.actions and len(sample.row.blocks) == 1 and len(sample.row.paragraphs) == 3
    assert typed in spelt(parts, sample.ids)
    assert (sample.ids == parts.model.vocabulary.im_end).sum() == 3


@settings(max_examples=200)
@given(text=st.text(max_size=60))
def test_any_text_survives_beside_perception_tokens(all_parts, text):
    ids = all_parts.processor.chat_template.plain(text)
    assert max(ids, default=0) < all_parts.model.vocabulary.end_of_text  # never a special token
    assert all_parts.tokenizer.decode(ids) == unicodedata.normalize("NFC", text)


def test_equal_images_are_prepared_once(make_parts, folder):
    parts = make_parts(*ALL)
    twice = samples_of(parts, folder, [conversation("0.png", action_turns("clip"), clip_images=["0.png"])] * 2)
    images = collate(twice).images
    assert list(images) == ["image"] and len(images["image"].tokens) == 1


def test_positions_are_those_of_transformers(make_parts, folder):
    """M-RoPE of several images in a row, against transformers' own."""
    parts = make_parts("encoder=[]")
    record = conversation("1.png", answer="brown")
    record["messages"][0]["content"] = "<image> and <image>\nare they alike?"
    record["images"] = ["1.png", "3.png"]
    batch = collate(samples_of(parts, folder, [record]))
    types = (batch.input_ids == parts.model.vocabulary.image_pad).int()[None]
    grids = torch.tensor(batch.images["image"].grids)
    want, _ = parts.model.qwen.model.get_rope_index(batch.input_ids[None], types, image_grid_thw=grids)
    assert torch.equal(batch.positions, want[:, 0])


def _with(record: dict, **changes: object) -> dict:
    return json.loads(json.dumps({**record, **changes}))


BAD_RECORDS = {
    "more placeholders than images": (_with(conversation("0.png"), images=[]), r"1 placeholder\(s\) <image> but 0"),
    "more images": (_with(conversation("0.png"), images=["0.png", "1.png"]), r"1 placeholder\(s\) <image> but 2"),
    "an action's image is missing": (conversation("0.png", action_turns("seg")), r"<seg_image> but 0 entries in `seg_images`"),
    "no messages": ({"images": []}, "non-empty list `messages`"),
    "a wrong role": ({"messages": [{"role": "robot", "content": "x"}]}, "`role` out of system, user, assistant"),
    "no answer": ({"messages": [{"role": "user", "content": "x"}]}, "last turn must be the assistant's"),
    "two users": ({"messages": [{"role": "user", "content": "x"}] * 2}, "take turns"),
    "another encoder": (conversation("0.png", action_turns("audio"), audio_images=["0.png"]), "re-encoder spelt 'audio'"),
    "a path that leaves the root": (conversation("../0.png"), "leaves data.root"),
    "an absolute path": (conversation("/etc/0.png"), "leaves data.root"),
    "no list of messages": ({"messages": None, "images": []}, r"list `messages` of turns \(`role`, `content`\).*keys are 'messages, images'"),
    "another layout": ({"conversations": [{"from": "human", "value": "x"}]}, "`conversations` .* is `messages`"),
    "an address": (conversation("https://example.org/a.jpg"), "'https://example.org/a.jpg': images are files, in records below"),
    "an image as text": (conversation("data:image/png;base64," + "A" * 1_000_000), "'data:image/png;base64,A+…A+': images are files"),
    "a path as long as an image": (conversation("../" + "A" * 1_000_000), "path '../A+…A+' leaves"),
    "an address of a video": ({**conversation("0.png"), "videos": ["https://example.org/a.mp4"], "messages": [{"role": "user", "content": "<image><video>"}, {"role": "assistant", "content": "x"}]}, "images are files"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_RECORDS)
def test_bad_records_say_where_and_what(name):
    raw, message = BAD_RECORDS[name]
    with pytest.raises(DataError, match=message) as error:
        parse_record(raw, where="train.jsonl:7", encoder_tokens=TOKENS)
    assert str(error.value).startswith("train.jsonl:7") and len(str(error.value)) < 600


@pytest.mark.parametrize(
    "raw", [{"messages": None}, {"conversations": [], "detection_images": ["0.png"]}, {}, [], None, "a"]
)
@pytest.mark.parametrize(("tokens", "perception"), [({"sam": "seg"}, True), ({}, True), (TOKENS, False)])
def test_records_of_another_shape_are_named_and_skippable(tmp_path, raw, tokens, perception):
    """Whatever is done with records before they are parsed."""
    (tmp_path / "a.jsonl").write_text(json.dumps(raw))
    source = RecordFile(SourceContext(tmp_path, tokens, {}, True, perception, 8, 0), path="a.jsonl")
    with pytest.raises(DataError, match=r"a\.jsonl:1: a record is an object with a non-empty list `messages`"):
        source[0]


@pytest.mark.parametrize(
    "column", [{"num_images": 1}, {"source_images": ["a", "b"]}, {"all_images": {"n": 1}}, {"_images": "x"}]
)
def test_other_columns_are_left_alone(tmp_path, column):
    """However they end; those of re-encoders still count."""
    shown = conversation("0.png", action_turns("detection"), detection_images=["0.png"])
    (tmp_path / "a.jsonl").write_text(json.dumps(shown | column) + "\n" + json.dumps(conversation("0.png") | column))
    for encoder in ("dino", "sam"):
        context = SourceContext(tmp_path, {encoder: TOKENS[encoder]}, {}, True, True, 8, 0)
        reencoded, plain = RecordFile(context, path="a.jsonl")
        assert reencoded.images == {"image": (ImageRef("0.png"),), encoder: (ImageRef("0.png"),)}
        assert plain.images == {"image": (ImageRef("0.png"),)}
    with pytest.raises(DataError, match=r"0 placeholder\(s\) <seg_image> but 1 entries"):
        parse_record(shown | {"seg_images": ["0.png"]}, where="r", encoder_tokens={"dino": "detection"})


BAD_IMAGES = {
    "missing": (lambda path: None, "a.png", "does not exist; is data.root="),
    "text": (lambda path: path.write_text("no image"), "a.png", "cannot be read"),
    "truncated": (lambda path: path.write_bytes((path.parent / "ok.png").read_bytes()[:90]), "a.png", "cannot be read"),
    "crop outside": (lambda path: Image.new("RGB", (9, 9)).save(path), "a.png_0,0,12,5", "does not lie inside the image of 9x9"),
    "empty crop": (lambda path: Image.new("RGB", (9, 9)).save(path), "a.png_5,0,5,5", "does not lie inside"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_IMAGES)
def test_bad_images_say_path_and_record(tmp_path, name):
    make, reference, message = BAD_IMAGES[name]
    Image.fromarray(np.random.default_rng(0).integers(0, 255, (30, 30, 3)).astype(np.uint8)).save(tmp_path / "ok.png")
    make(tmp_path / "a.png")
    with pytest.raises(DataError, match=message) as error:
        MediaStore(tmp_path).image(ImageRef.parse(reference), where="train.jsonl:7")
    assert "train.jsonl:7" in str(error.value) and "a.png" in str(error.value)


def test_a_link_out_of_the_root_is_refused(tmp_path):
    outside = tmp_path / "outside.png"
    Image.new("RGB", (9, 9)).save(outside)
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "a.png").symlink_to(outside)
    with pytest.raises(DataError, match="a link that leaves"):
        MediaStore(tmp_path / "root").image(ImageRef("a.png"), where="r")


def test_rows_over_the_limit(make_parts, folder):
    parts = make_parts(*ALL)
    encoder = parts.processor
    record = samples_of(parts, folder, mixed_records()[:1])[0].record
    whole = encoder.encode_conversation(record, folder)
    try:
        encoder.max_length = len(whole.ids) - 1
        with pytest.raises(DataError, match=f"has {len(whole.ids)} tokens, data.max_length is {len(whole.ids) - 1}"):
            encoder.encode_conversation(record, folder)
        encoder.overflow = "truncate"
        first_answer = int((whole.labels != IGNORE_INDEX).nonzero()[0]) + 2
        for limit in range(first_answer, len(whole.ids)):
            encoder.max_length = limit
            cut = encoder.encode_conversation(record, folder)
            assert len(cut.ids) <= limit
            assert torch.equal(cut.ids, whole.ids[: len(cut.ids)])
            assert all(block.start + block.length < len(cut.ids) for block in cut.row.blocks)
            parts.model.plan_forward(collate([cut]))
    finally:
        encoder.max_length, encoder.overflow = 512, "raise"


def test_easy_vqa_boxes_and_kinds():
    config = compose_config(*ALL, "data.actions={none:1,region:1,dino:1,sam:1,clip:1}")
    sources, folders = build_sources(config.data.test, config, split="test")
    source = sources[0]
    assert len(source) == 9673
    kinds = set()
    for index in range(60):
        record = source[index]
        x0, y0, x1, y1 = record.box
        pixels = np.asarray(folders[0].original(ImageRef(record.images["image"][0].path), where="")).astype(int)
        background = pixels[[0, 0, -1, -1], [0, -1, 0, -1]]
        background = background[np.argmax([(background == b).all(1).sum() for b in background])]
        outside = (pixels != background).any(-1)
        outside[y0:y1, x0:x1] = False
        assert not outside.any()
        kinds.add(frozenset(record.images) | ({"region"} if len(record.images["image"]) > 1 else set()))
    assert len(kinds) == 5


def test_vpt_files(tmp_path, folder):
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(record) + "\n" for record in mixed_records()))
    (tmp_path / "test.json").write_text(json.dumps(mixed_records()))
    for image in Path(folder.root).iterdir():
        (tmp_path / image.name).write_bytes(image.read_bytes())
    config = compose_config(*ALL, "data=vpt", f"data.root={tmp_path}", "data.train.vpt.options.path=train.jsonl")
    for split in ("train", "test"):
        sources, _ = build_sources(getattr(config.data, split), config, split=split)
        assert len(sources[0]) == len(mixed_records())
        assert sources[0][0].images["dino"] == (ImageRef("0.png"), ImageRef("2.png"))
    plain = compose_config("+experiment=baseline", "data=vpt", f"data.root={tmp_path}", "data.perception=false")
    sources, _ = build_sources(plain.data.test, plain, split="test")
    record = sources[0][0]
    assert [message.role for message in record.messages] == ["system", "user", "assistant"]
    assert list(record.images) == ["image"] and record.answer == "a red circle"


def test_records_for_one_encoder_train_another(tmp_path):
    record = conversation("0.png", action_turns("detection"), detection_images=["0.png"])
    (tmp_path / "train.json").write_text(json.dumps([record]))
    config = compose_config("encoder=[sam]", "data=vpt", f"data.root={tmp_path}")
    sources, _ = build_sources(config.data.train, config, split="train")
    assert sources[0][0].images["sam"] == (ImageRef("0.png"),)
    assert sources[0][0].messages[2].content == "<|seg_action_start|><|seg_action|><|seg_action_end|>"


@pytest.mark.parametrize(
    ("name", "text"), [("train.json", "[{]"), ("train.jsonl", '{"a": 1}\n{]\n'), ("train.json", "{}")]
)
def test_files_that_are_no_records(tmp_path, name, text):
    (tmp_path / name).write_text(text)
    config = compose_config("data=vpt", f"data.root={tmp_path}", f"data.train.vpt.options.path={name}")
    with pytest.raises(DataError, match=name):
        build_sources(config.data.train, config, split="train")


class Numbers(list):
    """A source of a given length."""


@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99), st.data())
def test_every_record_once_an_epoch_in_its_share(lengths, seed, data):
    weights = data.draw(st.lists(st.integers(1, 5), min_size=len(lengths), max_size=len(lengths)))
    mixture = build_mixture([Numbers(range(n)) for n in lengths], weights, seed)
    places = [mixture.sample_at(number) for number in range(1000)]
    for source, (length, weight) in enumerate(zip(lengths, weights)):
        mine = [place for place in places if place.source == source]
        assert abs(len(mine) - 1000 * weight / sum(weights)) <= 1
        for epoch in range(len(mine) // length):
            indices = [place.index for place in mine if place.epoch == epoch]
            assert sorted(indices) == list(range(length))
    assert build_mixture([Numbers(range(n)) for n in lengths], weights, seed).sample_at(777) == places[777]


def test_the_system_prompt_is_the_published_one(make_parts, folder):
    parts = make_parts("encoder=[]")
    own = conversation("0.png")
    own["messages"].insert(0, {"role": "system", "content": "Be brief."})
    assert spelt(parts, samples_of(parts, folder, [own])[0].ids).startswith(f"{IM_START}system\nBe brief.")


@settings(max_examples=40)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=4), st.integers(0, 99))
def test_every_record_of_every_source_once_an_epoch(lengths, seed):
    mixture = build_mixture([Numbers(range(n)) for n in lengths], [1] * len(lengths), seed, "exhaust")
    whole = {(source, index) for source, length in enumerate(lengths) for index in range(length)}
    for epoch in range(3):
        places = [mixture.sample_at(epoch * len(whole) + number) for number in range(len(whole))]
        assert {(place.source, place.index) for place in places} == whole
        assert {place.epoch for place in places} == {epoch}


def test_to_exhaustion_there_are_no_weights():
    sources = [Numbers(range(3)), Numbers(range(4))]
    with pytest.raises(ConfigError, match=r"weights of data\.train are \[1, 2\].*type data\.mixing=weights"):
        build_mixture(sources, [1, 2], 0, "exhaust")
    assert {build_mixture(sources, [0, 1], 0, "exhaust").sample_at(number).source for number in range(9)} == {1}


@settings(max_examples=40)
@given(st.integers(1, 3000), st.integers(0, 99))
def test_a_permutation_read_place_by_place(length, seed):
    """Every number once; another key, another order; about as far from the identity as any."""
    order = FeistelPermutation(length, (seed, 2, 0, 0))
    numbers = [order[place] for place in range(length)]
    assert sorted(numbers) == list(range(length))
    if length > 500:
        other = FeistelPermutation(length, (seed, 2, 0, 1))
        assert np.mean([other[place] == number for place, number in enumerate(numbers)]) < 0.02
        assert abs(np.corrcoef(numbers, range(length))[0, 1]) < 0.2


def test_a_billion_records_need_no_table():
    order = permutation(1_000_000_000, (0, 2, 0, 0))
    assert isinstance(order, FeistelPermutation) and len({order[place] for place in range(1000)}) == 1000
    assert isinstance(permutation(1000, (0,)), np.ndarray)
