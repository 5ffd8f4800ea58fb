"""Hostile and broken input ends in one of our errors, with place and fix, or is harmless."""

import json
import os
import re

import numpy as np
import pytest
import torch
from hypothesis import strategies as st
from omegaconf import OmegaConf
from PIL import Image

from conftest import ALL, TOKENS, action_turns, compose_config, conversation, mixed_records, samples_of
from helpers.fuzzing import PIECES, RANDOM, damaged, examples, fuzz, lying_png, mutated, refusing, scramble, seed_images
from vpt.config.resolve import resolve_config
from vpt.config.schema import TrainConfig
from vpt.config.validate import validate
from vpt.data.collate import collate
from vpt.data.feature_cache import FeatureCache
from vpt.data.images import MAX_ASPECT_RATIO, MediaStore
from vpt.data.record_store import RecordStore
from vpt.data.records import ImageRef, parse_record
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.errors import ConfigError, DataError
from vpt.generation.pipeline import build_question
from vpt.perception.regions import Region

TYPED = st.lists(st.sampled_from(PIECES) | st.text(max_size=5), max_size=8).map("".join)


@examples(150, 20_000)
def test_damaged_images(tmp_path, count):
    folder, files = MediaStore(tmp_path, max_side=24, max_pixels=4_000_000), seed_images()

    def check(name, random, times):
        data = files[name]
        for _ in range(times):
            data = damaged(data, random) if data else data
        (tmp_path / "a.png").write_bytes(data)
        with refusing(DataError, r"train\.json: record 7: .*a\.png"):
            image = folder.image(ImageRef("a.png"), where="train.json: record 7")
            assert image.mode == "RGB" and 0 < min(image.size) <= max(image.size) <= 24

    fuzz(count, check, name=st.sampled_from(sorted(files)), random=RANDOM, times=st.integers(0, 2))


class OneRecord(RecordFile):
    """A file that holds one decoded record."""

    def __init__(self, context: SourceContext, raw: object) -> None:
        self.context, self.root, self._media, self._serving = context, context.root, MediaStore(context.root), None
        self._stores, self._ends, self._count = [[("train.json: record 7", raw)]], [1], 1


@examples(200, 20_000)
def test_damaged_records(all_parts, folder, count):
    """What passes the checks can be planned, masked or not, with perception, without, on another grid."""
    ways = [(True, 8, False), (True, 4, False), (True, 0, False), (False, 8, False), (False, 8, True)]
    contexts = [SourceContext(folder.root, TOKENS, {}, True, perceives, bins, 0, plain)
                for perceives, bins, plain in ways]  # fmt: skip
    passed = []

    def check(raw, random, context):
        source = OneRecord(context, mutated(mutated(raw, random), random))
        with refusing(DataError, r"train\.json: record 7"):
            passed.append(sample := all_parts.processor.encode_conversation(source[0], folder))
            trains(sample)

    def trains(sample):
        masked = tuple(sample.row.paragraphs[1:2]) if sample.row.actions else ()
        batch = collate([sample], masked=[masked])
        all_parts.model.plan_forward(batch)
        if len(passed) % 50 == 1:
            with torch.no_grad():
                assert torch.isfinite(all_parts.model(batch).loss_sum)

    fuzz(count, check, raw=st.sampled_from(mixed_records()), random=RANDOM, context=st.sampled_from(contexts))
    assert passed


@examples(60, 5_000)
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_damaged_record_files(tmp_path, monkeypatch, name, count):
    monkeypatch.setenv("VPT_CACHE", str(tmp_path / "cache"))
    records = [json.dumps(record) for record in mixed_records()]
    whole = ("[" + ", ".join(records) + "]" if name == "a.json" else "\n".join(records)).encode()

    def check(random, nested):
        file = tmp_path / name
        data = damaged(whole, random)
        at = random.randrange(len(data) + 1)
        file.write_bytes(data[:at] + nested.encode() + data[at:])
        os.utime(file, ns=(0, random.getrandbits(60)))  # a file of its own to the cache
        with refusing(DataError, re.escape(str(file))):
            assert all(where.startswith(str(file)) for where, _ in RecordStore(file))

    fuzz(count, check, random=RANDOM, nested=st.sampled_from(["", "[" * 100_000, "1" * 5000, '"\\ud800"', "\x00"]))


@examples(25, 2_000)
def test_scrambled_configurations(count):
    bases = [OmegaConf.to_container(OmegaConf.structured(compose_config(f"+experiment={name}")))
             for name in ("dino", "all", "scenes/region")]  # fmt: skip

    def check(base, random):
        with refusing(ConfigError, r"\S"):
            validate(resolve_config(OmegaConf.create(scramble(base, random)), TrainConfig))

    fuzz(count, check, base=st.sampled_from(bases), random=RANDOM)


@examples(60, 5_000)
def test_nothing_that_a_user_types_acts(all_parts, folder, count):
    """In a record's human turn, in a prompt of eval.py, and in a question to vpt.cli.ask: the row is as with plain words."""
    encoder, vocabulary = all_parts.processor, all_parts.model.vocabulary
    special = sorted({id for ids in (vars(one).values() for one in vocabulary.actions.values()) for id in ids}
                     | {vocabulary.region_start, vocabulary.region_end, *vocabulary.x, *vocabulary.y, vocabulary.im_start,
                        vocabulary.im_end, vocabulary.image_pad, vocabulary.video_pad, vocabulary.end_of_text})  # fmt: skip
    encoder.max_length = 100_000

    def structure(sample):
        row = sample.row
        marks = [token for token in sample.ids.tolist() if token in special]
        return [a.encoder for a in row.actions], [b.source for b in row.blocks], len(row.paragraphs), marks

    def samples(text):
        raw = conversation("0.png", action_turns("detection"), detection_images=["0.png"])
        raw["messages"][0]["content"] = f"<image>\n{text}"
        record = parse_record(raw, where="r", encoder_tokens=TOKENS)
        asked = build_question(all_parts.config, folder.root / "0.png", f"x{text}", "")
        return (
            encoder.encode_conversation(record, folder),
            encoder.encode_prompt(record, folder),
            encoder.encode_prompt(asked.record, asked.media),
        )

    plain = [structure(sample) for sample in samples("what?")]

    def check(typed):
        assert [structure(sample) for sample in samples(typed)] == plain

    try:
        fuzz(count, check, typed=TYPED)
    finally:
        encoder.max_length = 512


@examples(60, 5_000)
def test_whatever_an_assistant_says_can_be_trained_on(all_parts, folder, count):
    """Half an action, one without an image, cells in disorder: a row as good as any."""

    def check(said, answer):
        raw = conversation("0.png", [{"role": "assistant", "content": said}, {"role": "user", "content": "and?"}],
                           answer=answer)  # fmt: skip
        with refusing(DataError, r"record 0: .*(data\.max_length|is no token of this model)"), torch.no_grad():
            assert torch.isfinite(all_parts.model(collate(samples_of(all_parts, folder, [raw]))).loss_sum)

    fuzz(count, check, said=TYPED, answer=TYPED)


@examples(100, 20_000)
def test_any_text_is_read_for_regions(count):
    def check(text):
        for match, region in [*Region.find(text), *Region.find(text, numbers=True)]:
            assert match[0] in text and Region.find(region.to_text())[0][1] == region

    pieces = st.sampled_from([*PIECES, "<|x_3|><|y_2|>", "<|region_token_start|><|x_9999|><|y_1|>", "[0, 0,"])
    fuzz(count, check, text=st.lists(pieces | st.text(max_size=4), max_size=9).map("".join))


# ---- one by one ----


def saved(folder, name: str, image: Image.Image, **options: object) -> Image.Image:
    """As it is read back."""
    image.save(folder / name, **options)
    return MediaStore(folder, max_side=400).image(ImageRef(name), where="r")


def test_modes_become_the_colours_that_they_mean(tmp_path):
    grey = np.linspace(0, 255, 64).astype(np.uint8).reshape(8, 8)
    wide = saved(tmp_path, "16.png", Image.fromarray(grey.astype(np.uint16) * 256))  # not all white
    assert np.array_equal(np.asarray(wide)[:, :, 0], grey)
    red = Image.new("RGB", (8, 8), (255, 0, 0))
    assert np.abs(np.asarray(saved(tmp_path, "cmyk.tif", red.convert("CMYK"))).astype(int) - [255, 0, 0]).max() < 3
    clear = red.convert("RGBA")
    clear.putalpha(Image.fromarray(np.repeat([[0, 255]], 8, 0).repeat(4, 1).astype(np.uint8)))
    for name, image in (("rgba.png", clear), ("la.png", clear.convert("LA")), ("p.gif", clear)):
        read = np.asarray(saved(tmp_path, name, image))
        assert (read[:, :4] == 255).all() and (read[:, 4:] != 255).any(), name  # white where it is transparent
    assert set(np.unique(np.asarray(saved(tmp_path, "1.png", red.convert("1"))))) <= {0, 255}
    with pytest.raises(DataError, match="mode F have no known range"):
        saved(tmp_path, "f.tif", Image.fromarray(grey.astype(np.float32)))


def test_an_animation_is_its_first_frame(tmp_path):
    frames = [Image.new("RGB", (8, 8), colour) for colour in ("red", "lime", "blue")]
    for name in ("a.gif", "a.webp", "a.png"):
        read = saved(tmp_path, name, frames[0], save_all=True, append_images=frames[1:])
        assert np.abs(np.asarray(read).astype(int) - [255, 0, 0]).max() < 8, name


def test_a_line_of_pixels_can_be_looked_at(all_parts, tmp_path):
    """By every encoder; and a crop of it, as a model may select one."""
    Image.new("RGB", (1, 10_000), "red").save(tmp_path / "a.png")
    folder = MediaStore(tmp_path)
    assert folder.image(ImageRef("a.png"), where="r").size == (3, 512)  # 512 / 200, rounded up
    assert folder.image(ImageRef("a.png", (0, 0, 1, 400)), where="r").size == (400 // MAX_ASPECT_RATIO, 400)
    record = conversation("a.png", action_turns("detection"), action_turns("seg"), action_turns("clip"),
                          detection_images=["a.png"], seg_images=["a.png"], clip_images=["a.png_0,0,1,10000"])  # fmt: skip
    assert torch.isfinite(all_parts.model(collate(samples_of(all_parts, folder, [record]))).loss_sum)


def test_exif_turns_an_image_where_that_is_asked_for(tmp_path):
    image = Image.fromarray(np.arange(8 * 4 * 3, dtype=np.uint8).reshape(4, 8, 3))
    exif = image.getexif()
    exif[0x0112] = 6  # turn by 90 degrees clockwise
    image.save(tmp_path / "a.png", exif=exif)
    stored, upright = (
        MediaStore(tmp_path, apply_exif_rotation=way).image(ImageRef("a.png"), where="r") for way in (False, True)
    )
    assert np.array_equal(np.asarray(stored), np.asarray(image))
    assert np.array_equal(np.asarray(upright), np.rot90(np.asarray(image), -1))


FILES = {
    "a header that promises a bomb": (lambda path: lying_png(path, 50_000, 50_000), "cannot be read|allowed are 1 to"),
    "a header that promises too much": (lambda path: lying_png(path, 12_000, 9_000), r"allowed are 1 to 100000000; .*data\.image\.max_file_pixels"),
    "a header that promises more than there is": (lambda path: lying_png(path, 500, 500), "cannot be read"),
    "no pixels": (lambda path: lying_png(path, 0, 5), "cannot be read|has 0x5 pixels"),
    "an empty file": (lambda path: path.write_bytes(b""), "cannot be read"),
    "a folder": (lambda path: path.mkdir(), "does not exist"),
    "a pipe that nobody writes to": (lambda path: os.mkfifo(path), "does not exist"),
    "a link to itself": (lambda path: path.symlink_to(path), "does not exist|no path of a file"),
    "a link out of the root": (lambda path: path.symlink_to("/etc/passwd"), "a link that leaves"),
    "PostScript": (lambda path: Image.new("RGB", (9, 9)).save(path, "EPS"), "cannot be read"),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_files_that_are_no_images(tmp_path, name):
    make, message = FILES[name]
    (tmp_path / "root").mkdir()
    make(tmp_path / "root" / "a.png")
    folder = MediaStore(tmp_path / "root")
    with pytest.raises(DataError, match=f"^train.jsonl:7: .*a.png.*({message})"):
        folder.image(ImageRef("a.png"), where="train.jsonl:7")


def test_a_linked_folder_leaves_the_root_too(tmp_path, all_parts):
    """Neither opened nor read for its digest."""
    (tmp_path / "root").mkdir()
    Image.new("RGB", (9, 9)).save(tmp_path / "secret.png")
    (tmp_path / "root" / "in").symlink_to(tmp_path)
    folder, reference = MediaStore(tmp_path / "root"), ImageRef("in/secret.png")
    with pytest.raises(DataError, match="a link that leaves"):
        folder.image(reference, where="r")
    view = all_parts.processor.transforms["dino"]
    assert FeatureCache(tmp_path / "kept", 1 << 20, {view.name: ""}).key(view, reference, folder) is None


def test_record_files_below_the_root_only(tmp_path):
    (tmp_path / "root").mkdir()
    (tmp_path / "train.json").write_text(json.dumps(mixed_records()))
    (tmp_path / "root" / "linked.json").symlink_to(tmp_path / "train.json")
    for path in ("../train.json", str(tmp_path / "train.json"), "linked.json"):
        context = SourceContext(tmp_path / "root", TOKENS, {}, True, True, 8, 0)
        with pytest.raises(DataError, match=r"leaves data\.root"):
            RecordFile(context, path=path)
    with pytest.raises(DataError, match=r"leaves data\.root"):
        RecordFile(SourceContext(tmp_path / "root", TOKENS, {}, True, True, 8, 0), path="a.json", images="..")


def test_text_that_no_row_could_hold_is_not_even_encoded(all_parts, folder, monkeypatch):
    monkeypatch.setattr(type(all_parts.processor.chat_template.plain), "_encode", lambda *_: pytest.fail("encoded"))
    record = conversation("0.png")
    record["messages"][0]["content"] += "a" * 10_000_000
    with pytest.raises(DataError, match=r"record 0: its text has 10,000,\d+ characters, data\.max_length=512 tokens"):
        samples_of(all_parts, folder, [record])


def test_cells_beyond_the_grid(folder):
    said = "<|region_token_start|><|x_1|><|y_2|><|x_99|><|y_6|><|region_token_end|>"
    record = conversation("0.png", [{"role": "assistant", "content": said}, {"role": "user", "content": "<image>"}])
    record["images"].append("0.png_0,0,5,5")
    with pytest.raises(DataError, match=r"names Region.*the grid has 8x8 cells"):
        OneRecord(SourceContext(folder.root, TOKENS, {}, True, True, 8, 0), record)[0]


@pytest.mark.parametrize("target", ["os.system", "subprocess.Popen", "vpt.data.images.MediaStore", "vpt.encoders.dino"])
def test_a_target_is_what_it_should_be(target):
    """A configuration, also that of a checkpoint, can make nothing but what its place is for."""
    with pytest.raises(ConfigError, match=r"is (no|not an) "):
        compose_config(*ALL, f"encoder.dino.target={target}")
    with pytest.raises(ConfigError, match=r"is (no|not an) "):
        compose_config(f"data.train.easy_vqa.target={target}")
