"""Rows of any shape against a second writer (`helpers.plain_rows`): ids, labels, positions, blocks, actions."""

from copy import copy
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import Image

from conftest import ALL, TOKENS
from helpers.fuzzing import examples, fuzz
from helpers.plain_rows import Settings, as_record, cells, write_row
from vpt.data.images import MediaStore
from vpt.data.positions import PositionScheme
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile

SIZES = {"a.png": (64, 64), "b.png": (96, 48), "c.png": (37, 113), "sub/d.png": (600, 40), "e,1.png": (130, 85)}
FRAMES = [f"f{number}.png" for number in range(5)]
TYPED = ["What is it?", " and ", "\n", "[1, 2, 3, 4]", "é", "日本", "e\u0301", "<image", "image>", "|>", "  ", "at 3.5"]
WORDS = st.lists(st.sampled_from(TYPED) | st.text(max_size=4), max_size=3).map("".join).filter(lambda s: "<|" not in s)
TOKEN = st.sampled_from(sorted(TOKENS.values()))
METADATA = st.fixed_dictionaries(
    {}, optional={"dataset": st.text(max_size=5), "question_id": st.integers(), "answers": st.just(["a", "b"]),
                  "num_objects": st.just(3), "region_bins_note": st.none()},
)  # fmt: skip


class OneRecord(RecordFile):
    """A record as if a file held it."""

    def __init__(self, context, raw):
        self.context, self.root, self._media, self._serving = context, context.root, MediaStore(context.root), None
        self._stores, self._ends, self._count = [[("train.json: record 7", raw)]], [1], 1


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("shapes")
    (root / "sub").mkdir()
    for name, (width, height) in SIZES.items():
        Image.fromarray(np.zeros((height, width, 3), dtype=np.uint8)).save(root / name)
    for name in FRAMES:
        Image.new("RGB", (80, 48)).save(root / name)
    return MediaStore(root)


@st.composite
def conversations(draw, bins: int):
    """Turns as `helpers.plain_rows` has them, with regions in cells of a `bins` x `bins` grid."""
    cell = st.integers(0, bins - 1)
    corners = st.tuples(cell, cell, cell, cell)
    path = st.sampled_from(sorted(SIZES))
    whole = st.tuples(st.just("image"), st.just("") | TOKEN, path, st.none())
    video = st.tuples(st.just("video"), st.integers(1, 5).map(lambda count: FRAMES[:count]))
    words = st.tuples(st.just("text"), WORDS)
    typed = st.tuples(st.just("text"), st.sampled_from(["<image>", "<video>", "<seg_image> "]) | WORDS)

    def assistant(*, shown: bool, most: int = 4):
        numeric = draw(st.booleans()) and shown  # what nothing shows is no region where it is said in numbers
        asked = st.tuples(st.just("region"), corners, st.just(numeric)) | st.tuples(st.just("action"), TOKEN)
        parts = draw(st.lists(typed | asked, min_size=1, max_size=most))
        if shown and not any(part[0] != "text" for part in parts):
            parts.append(draw(asked))
        if numeric:  # then every run of numbers is one
            parts = [
                (kind, rest[0].replace("[", "("), *rest[1:]) if kind == "text" else (kind, *rest)
                for kind, *rest in parts
            ]
        return parts

    def answer(parts):
        """A user's turn that shows each request, those of a kind in order, alone or beside words and other images."""
        wanted = [("image", "", draw(path), part[1]) if part[0] == "region" else ("image", part[1], draw(path), None)
                  for part in parts if part[0] != "text"]  # fmt: skip
        kinds = draw(st.permutations([shown[1] for shown in wanted]))
        queues = {kind: [shown for shown in wanted if shown[1] == kind] for kind in kinds}
        turn = [queues[kind].pop(0) for kind in kinds]
        if draw(st.booleans()):
            return turn
        said = ("text", "Now. " + draw(WORDS))
        turn.insert(draw(st.integers(0, len(turn))), said)
        if draw(st.booleans()):  # another image, which nobody asked for
            turn.append(draw(whole.filter(lambda shown: not shown[1])))
        return turn

    turns = [("system", [draw(typed)])] if draw(st.booleans()) else []
    turns.append(("user", draw(st.lists(words | whole | video, max_size=3))))
    for _ in range(draw(st.integers(0, 2))):
        shown = draw(st.booleans())
        turns.append(("assistant", assistant(shown=shown)))
        turns.append(("user", answer(turns[-1][1]) if shown else [draw(words)]))
    turns.append(("assistant", assistant(shown=False, most=3)))
    return turns


def of_box(part, corners):
    """A region, or the image that shows it, with other corners."""
    if part[0] == "region":
        return "region", corners, part[2]
    return (*part[:3], corners) if part[0] == "image" and part[3] else part


@st.composite
def cases(draw):
    """(turns, settings without a tokenizer, metadata)."""
    text, written = draw(st.booleans()), draw(st.sampled_from([8, 16]))
    turns = draw(conversations(written))
    shown = [part for _, parts in turns for part in parts if part[0] == "video" or (part[0] == "image" and not part[1])]
    box, metadata = None, draw(METADATA)
    if shown and shown[0][0] == "image":
        width, height = size = SIZES[shown[0][2]]
        if draw(st.booleans()):
            metadata |= {"image_size": [width, height]}
        if draw(st.booleans()):
            x0, y0 = draw(st.integers(0, width - 1)), draw(st.integers(0, height - 1))
            box = x0, y0, draw(st.integers(x0 + 1, width + 2)), draw(st.integers(y0 + 1, height + 2))
            if sum(part[0] == "region" for _, parts in turns for part in parts) == 1:  # it is the region's evidence
                turns = [(role, [of_box(part, cells(box, size, written)) for part in parts]) for role, parts in turns]
    settings = Settings(
        None, SIZES | dict.fromkeys(FRAMES, (80, 48)), written, 4 if text else 8, text, draw(st.sampled_from([1, 2])),
        draw(st.sampled_from(["mrope", "mrope", "sequential"])), draw(st.sampled_from(["sequential", "grid"])), box,
        draw(st.sampled_from([0, 0, 1])),
    )  # fmt: skip
    return turns, settings, metadata


@examples(60, 20_000)
def test_rows_are_those_of_a_plain_writer(make_parts, all_parts, images, count):
    """Turn texts around regions, several perceptions, placeholders in any turn, metadata, sizes, grids, both region
    formats, one or two control tokens: equal to the last position."""
    in_text = make_parts(*ALL, "model.region_bins=4", "model.region_format=text")
    kinds = set()

    def processor_of(settings):
        parts = in_text if settings.text else all_parts
        template = copy(parts.processor.chat_template)
        template.scale = settings.scale
        scheme = PositionScheme(settings.positions, settings.reencoded)
        return parts, replace(parts.processor, chat_template=template, position_scheme=scheme, max_length=100_000)

    def check(case):
        turns, settings, metadata = case
        parts, processor = processor_of(settings)
        context = SourceContext(images.root, TOKENS, {}, True, True, settings.bins, 0)
        record = OneRecord(context, as_record(turns, settings, **metadata))[0]
        sample = processor.encode_conversation(record, images)
        want = write_row(turns, replace(settings, tokenizer=parts.tokenizer))
        assert sample.ids.tolist() == want.ids
        assert sample.labels.tolist() == want.labels
        assert [tuple(each) for each in sample.positions.T.tolist()] == want.positions
        assert [(b.start, b.length, b.source) for b in sample.row.blocks] == want.blocks
        assert [[a.start, a.count, a.encoder, a.block] for a in sample.row.actions] == want.actions
        assert [[*span] for span in sample.row.paragraphs] == want.paragraphs
        kinds.update(tuple(part[0] for part in parts) for role, parts in turns if role == "assistant")

    fuzz(count, check, case=cases())
    assert any(kind.count("region") > 1 for kind in kinds) and any({"region", "action"} <= {*kind} for kind in kinds)
