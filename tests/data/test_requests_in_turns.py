"""Regions and re-encodings wherever they stand in a turn, several of them, with words around: nothing is lost."""

import json
from contextlib import nullcontext
from dataclasses import replace

import pytest
import torch

from conftest import ALL, TOKENS, action_turns, samples_of
from helpers.gradients import MODEST, assert_same, losses_and_gradients
from vpt.data.collate import collate
from vpt.data.records import parse_record
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import DataError
from vpt.evaluation.questions import expected_actions
from vpt.perception.masking import Masking
from vpt.perception.regions import Region
from vpt.perception.tokens import action_tokens

SIZE = (96, 48)  # of 1.png
FINE, OTHER = Region(2, 2, 5, 5), Region(0, 4, 7, 7)  # of 8x8 cells; joined to 4x4: (1, 1, 2, 2), (0, 2, 3, 3)
COARSE, OTHER_COARSE = Region(1, 1, 2, 2), Region(0, 2, 3, 3)
DINO, SAM = ("".join(action_tokens(token)) for token in ("detection", "seg"))


def crop(region: Region, bins: int = 8) -> str:
    return "1.png_" + ",".join(map(str, region.to_box(SIZE, bins=bins)))


def raw(said: str, shown: str, *crops: str, answer: str = "a cup", **images: list[str]) -> dict:
    texts = ["<image>\nwhat?", said, shown, answer]
    turns = [{"role": ("user", "assistant")[i % 2], "content": text} for i, text in enumerate(texts)]
    return {"messages": turns, "images": ["1.png", *crops], **images}


def read(folder, record: dict, *, bins: int = 8, perception: bool = True):
    """As a record file of the run reads it."""
    context = SourceContext(folder.root, TOKENS, {}, True, perception, bins, 0)
    (folder.root / "one.json").write_text(json.dumps([record]))
    return RecordFile(context, path="one.json")[0]


def test_several_requests_and_what_shows_them(folder):
    """Regions by tokens or numbers, re-encodings, in any order: each has its own image of the next turn."""
    said = f"{DINO} left {FINE.to_text()}{SAM}{OTHER.to_text()}"
    record = raw(said, "<image><detection_image><image><seg_image>", crop(FINE), crop(OTHER),
                 detection_images=["1.png"], seg_images=["1.png"])  # fmt: skip
    found = read(folder, record, bins=4)
    assert found.messages[2].content == f"{DINO} left {COARSE.to_text()}{SAM}{OTHER_COARSE.to_text()}"
    crops = [shown.crop for shown in found.images["image"][1:]]
    assert crops == [COARSE.to_box(SIZE, bins=4), OTHER_COARSE.to_box(SIZE, bins=4)]
    assert expected_actions(found, TOKENS) == ["region", "dino", "region", "sam"]


@pytest.mark.parametrize("shown", ["<image>", "<image>\nNow answer."])
@pytest.mark.parametrize("said", ["At the left. {}", "{} I think", "Here:\n{}, no?", "{}"])
@pytest.mark.parametrize("spelling", [Region.to_text, Region.to_numbers])
def test_words_beside_a_region_stay(folder, said, shown, spelling):
    record = read(folder, raw(said.format(spelling(FINE)), shown, crop(FINE)), bins=4)
    assert [message.content for message in record.messages[2:]] == [said.format(COARSE.to_text()), shown, "a cup"]
    assert record.images["image"][1].crop == COARSE.to_box(SIZE, bins=4)


@pytest.mark.parametrize("overrides", [(), ("model.region_format=text",)], ids=["tokens", "text"])
def test_the_labels_hold_every_word(make_parts, folder, overrides):
    parts = make_parts("encoder=[]", *overrides)
    said = f"It is here {FINE.to_text()} or there {OTHER.to_text()}, I think."
    [sample] = samples_of(parts, folder, [raw(said, "<image><image>", crop(FINE), crop(OTHER))])
    learned = parts.tokenizer.decode(sample.labels[sample.labels != -100])
    if overrides:
        said = f"It is here {FINE.to_numbers()} or there {OTHER.to_numbers()}, I think."
    assert learned == f"{said}<|im_end|>a cup<|im_end|>"
    half = raw(FINE.to_text()[:-24], "<image>", crop(FINE))  # letters where regions are text, tokens elsewhere
    with pytest.raises(DataError, match="no token of this model") if overrides else nullcontext():
        samples_of(parts, folder, [half])


def test_numbers_that_nothing_shows_are_text(folder):
    for record in (
        raw("one of [1, 2, 3, 4]", "and now?"),
        raw("one of [1, 2, 3, 4]", "<image>", "2.png"),  # another image, which is no crop
        raw("one of [1, 2, 3, 4]", "<image><image>", crop(FINE), crop(FINE)),
        raw("here", "<image>", crop(FINE), answer="[1, 2, 3, 4]"),
    ):
        assert (
            read(folder, record, bins=4).messages[1:] == parse_record(record, where="r", encoder_tokens={}).messages[1:]
        )


def test_a_region_that_is_the_answer_is_brought_to_the_grid(folder):
    """Nothing shows it; with `data.perception=false` too, where requests go and answers stay."""
    record = raw(FINE.to_text(), "<image>", crop(FINE), answer=f"There: {OTHER.to_text()}")
    assert read(folder, record, bins=4).messages[-1].content == f"There: {OTHER_COARSE.to_text()}"
    plain = read(folder, record, bins=4, perception=False)
    assert [message.content for message in plain.messages[1:]] == ["<image>\nwhat?", f"There: {OTHER_COARSE.to_text()}"]


OUTSIDE = FINE.to_text().replace("x_5", "x_8")
REFUSED = {
    "a cell outside, text follows": (raw(OUTSIDE, "<image>\nNow answer.", crop(FINE)), 8, "names Region.*grid has 8x8"),
    "a cell outside, words before": (raw(f"There {OUTSIDE}", "<image>", crop(FINE)), 4, "names Region.*grid has 8x8"),
    "a cell outside, in the answer": (raw("a", "b", answer=OUTSIDE), 8, "message 4 names Region.*grid has 8x8"),
    "the second of two": (raw(FINE.to_text() + OUTSIDE, "<image><image>", crop(FINE), crop(FINE)), 8, "grid has 8x8"),
    "half a region": (raw(FINE.to_text()[:-24], "<image>", crop(FINE)), 4, r"holds <\|region_token_start\|> outside a"),
    "two regions, one crop": (raw(FINE.to_text() * 2, "<image>", crop(FINE)), 4, r"names 2 region\(s\), .* shows 1"),
    "no grid": (raw(f"There {FINE.to_text()}", "<image>\nso?", crop(FINE)), 0, "region_bins=0 knows none"),
    "no grid, nothing shown": (raw("a", "b", answer=FINE.to_text()), 0, "region_bins=0 knows none"),
    "finer cells": (raw(f"There {FINE.to_text()}", "<image>\nso?", crop(FINE)), 16, "cells cannot be split"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_a_region_that_cannot_be_named_is_refused(folder, name):
    record, bins, message = REFUSED[name]
    with pytest.raises(DataError, match=rf"one\.json.*{message}"):
        read(folder, record, bins=bins)


@pytest.mark.parametrize("said", ["<|x_8|>", "<|y_19|> here", "no <|region_token_start|><|x_1|><|y_2|><|x_8|>", SAM])
def test_tokens_that_a_model_lacks_are_never_letters(make_parts, folder, said):
    """Where a row is written, wherever the record comes from, in training and in a prompt."""
    parts, record = make_parts("encoder=[dino]"), raw(said, "well?")
    with pytest.raises(DataError, match=r"record 0: an assistant says <\|.*no token of this model.*model\.region_bins"):
        samples_of(parts, folder, [record])
    with pytest.raises(DataError, match=r"r: an assistant says <\|"):
        parts.processor.encode_prompt(parse_record(record, where="r", encoder_tokens=TOKENS), folder, turns=2)


def rows() -> list[dict]:
    """Several requests in a turn: regions, a region and a re-encoding, two encoders, one encoder twice."""
    regions = FINE.to_text() + OTHER.to_text()
    twice = raw(DINO + DINO, "<detection_image><detection_image>", detection_images=["1.png", "2.png"])
    twice["messages"][3:3] = action_turns("clip")
    return [
        raw(regions, "<image><image>", crop(FINE), crop(OTHER)),
        raw(f"There. {FINE.to_text()}{DINO}", "<image><detection_image>", crop(FINE), detection_images=["1.png"]),
        raw(SAM + DINO, "<detection_image>\n<seg_image>", detection_images=["0.png"], seg_images=["1.png"]),
        {**twice, "clip_images": ["0.png"]},
        raw(f"{DINO} and {SAM}{regions} so", "<detection_image><seg_image><image><image> well?", crop(FINE),
            crop(OTHER), detection_images=["1.png"], seg_images=["1.png"]),
    ]  # fmt: skip


@pytest.mark.parametrize("scale", [1, 2])
@pytest.mark.parametrize("mask", ["off", "zero", "bottleneck"])
def test_shared_equals_full_for_several_requests(make_parts, folder, scale, mask):
    """Each image is steered by the action that asked for it, in order."""
    parts = make_parts(*ALL, f"model.projector_scale={scale}", *MODEST)
    samples = samples_of(parts, folder, rows())
    steered = [[sample.row.blocks[action.block].source for action in sample.row.actions] for sample in samples]
    assert steered == [[], ["dino"], ["sam", "dino"], ["dino", "dino", "clip"], ["dino", "sam"]]
    assert [action.block for action in samples[3].row.actions] == [1, 2, 3]
    spans = [
        Masking(1, 1.0).spans(sample.row) if mask != "off" and number % 2 else ()
        for number, sample in enumerate(samples)
    ]
    mode = "bottleneck" if mask == "bottleneck" else "zero"
    batch = collate(samples, masked=spans)
    full = losses_and_gradients(parts, batch, "full", mask_mode=mode)
    shared = losses_and_gradients(parts, batch, "shared", mask_mode=mode)
    assert_same(shared, full)


def test_what_each_action_saw_steers_its_own_image(make_parts, folder):
    """Two encodings of one image in one turn: with the states exchanged, other logits come out."""
    parts = make_parts("encoder=[dino]")
    twice = raw(f"{DINO} more {DINO}", "<detection_image><detection_image>", detection_images=["1.png", "2.png"])
    [sample] = samples_of(parts, folder, [twice])
    first, second = sample.row.actions
    crossed = replace(sample, row=replace(sample.row, actions=(replace(first, block=2), replace(second, block=1))))
    with torch.no_grad():
        right, wrong = (parts.model(collate([each]), keep_logits=True).logits for each in (sample, crossed))
    assert (right - wrong).abs().max() > 1e-3
