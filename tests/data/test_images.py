"""Images on every way in: the same pixels of the same file, of the size that the record says, as upstream where asked."""

import json
import warnings
from base64 import b64encode
from dataclasses import replace
from io import BytesIO
from pathlib import Path

import av
import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from conftest import conversation
from helpers.fuzzing import lying_png, seed_images
from vpt.config.schema import DataConfig, ImageConfig
from vpt.data.build import media_store
from vpt.data.images import FORMATS, MediaStore
from vpt.data.references import ImageRef
from vpt.data.sources.base import SourceContext
from vpt.data.sources.record_files import RecordFile
from vpt.encoders.transforms import QwenTransform
from vpt.errors import DataError
from vpt.generation.pipeline import build_question
from vpt.integrations.in_memory import Responder
from vpt.serving.conversation import PromptReader
from vpt.serving.protocol import ChatMessage

FILES = {name: data for name, data in seed_images().items() if name.split()[0] in FORMATS}


def _turned(pixels: np.ndarray) -> bytes:
    buffer, image = BytesIO(), Image.fromarray(pixels)
    exif = image.getexif()
    exif[0x0112] = 6  # to be turned clockwise
    image.save(buffer, "PNG", exif=exif)
    return buffer.getvalue()


def _keyed() -> bytes:
    """An RGB image one of whose colours counts as transparent."""
    buffer = BytesIO()
    Image.new("RGB", (40, 30), (255, 0, 0)).save(buffer, "PNG", transparency=(255, 0, 0))
    return buffer.getvalue()


PIXELS = np.random.default_rng(0).integers(0, 255, (30, 40, 3)).astype(np.uint8)
FILES |= {"turned": _turned(PIXELS), "keyed": _keyed()}


@pytest.mark.parametrize("upright", [False, True])
@pytest.mark.parametrize("name", FILES)
def test_every_way_in_sees_the_same_pixels(all_parts, tmp_path, name, upright):
    """A data set, `vpt ask`, `vpt serve`, an adapter that is given a path, and one that is given an open image."""
    path = tmp_path / "a.png"
    path.write_bytes(FILES[name])
    limits = replace(all_parts.config.data.image, apply_exif_rotation=upright, max_side=32)
    config = replace(all_parts.config, data=replace(all_parts.config.data, image=limits))
    responder = Responder.__new__(Responder)
    responder.bundle = type(all_parts)(**{**vars(all_parts), "config": config})

    def adapted(image):
        record, store = responder._record([image], "what?", "")
        return store.image(record.image, where="question")

    def asked():
        question = build_question(config, path, "what?", "")
        return question.media.image(question.record.image, where="question")

    def served():
        url = f"data:image/png;base64,{b64encode(FILES[name]).decode()}"
        parts = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": "what?"}]
        reader = PromptReader(config, PromptReader.special_tokens(all_parts.tokenizer), 1, 10**6)
        record, media = reader.read([ChatMessage(role="user", content=parts)], "")
        return media.image(record.image, where="question")

    ways = [asked, served, lambda: adapted(path), lambda: adapted(str(path)), lambda: adapted(Image.open(path))]
    read = media_store(tmp_path, config.data)
    if name == "TIFF F":
        for way in (*ways, lambda: read.image(ImageRef("a.png"), where="question")):
            with pytest.raises(DataError, match=r"mode F have no known range|cannot be read; send"):
                way()
        return
    want = np.asarray(read.image(ImageRef("a.png"), where="r"))
    for number, way in enumerate(ways):
        assert np.array_equal(np.asarray(way()), want), (name, number)
    assert read.size(ImageRef("a.png"), where="r") == read.original(ImageRef("a.png"), where="r").size


@pytest.mark.parametrize("address", ["https://example.org/a.png", "data:image/png;base64," + "A" * 100_000])
def test_an_address_is_no_image(all_parts, address):
    responder = Responder.__new__(Responder)
    responder.bundle = all_parts
    record, store = responder._record([address], "what?", "")
    with pytest.raises(DataError, match="images are files") as error:
        store.image(record.image, where="question")
    assert len(str(error.value)) < 400


def test_turned_and_keyed_images_mean_what_viewers_show(tmp_path):
    (tmp_path / "turned.png").write_bytes(FILES["turned"])
    (tmp_path / "keyed.png").write_bytes(FILES["keyed"])
    upright = MediaStore(tmp_path, apply_exif_rotation=True)
    assert np.array_equal(np.asarray(upright.image(ImageRef("turned.png"), where="")), np.rot90(PIXELS, -1))
    assert (np.asarray(upright.image(ImageRef("keyed.png"), where="")) == 255).all()


@pytest.mark.parametrize("degrees", [-90, 90, 180])
def test_videos_are_turned_as_images_are(tmp_path, degrees):
    """By their display matrix, which counts counterclockwise."""
    path = tmp_path / "a.mp4"
    shown = np.zeros((48, 80, 3), np.uint8)
    shown[:24, :40] = 255  # a corner, by which the way it is turned can be told
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=2, width=80, height=48)
        stream.pix_fmt = "yuv420p"
        stream.set_display_rotation(degrees)
        for _ in range(4):
            container.mux(stream.encode(av.VideoFrame.from_ndarray(shown)))
        container.mux(stream.encode())
    for upright, want in ((False, shown), (True, np.rot90(shown, degrees // 90))):
        media = MediaStore(tmp_path, apply_exif_rotation=upright)
        clip = media.video(type("", (), {"fps": None, "frames": (ImageRef("a.mp4"),)}), where="r").frames
        for image in (*clip, media.original(ImageRef("a.mp4"), where="r")):
            assert np.abs(np.asarray(image).astype(int) - want).mean() < 20
        assert media.size(ImageRef("a.mp4"), where="r") == want.shape[1::-1]


def test_the_limit_of_pixels_is_the_configurations_alone(tmp_path):
    """Pillow warns at 89 million pixels and refuses at 179 million; here both are neither."""
    sizes = {"warned.png": (12_000, 9_000), "bomb.png": (20_000, 10_000)}
    for name, size in sizes.items():
        lying_png(tmp_path / name, *size)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for name, (width, height) in sizes.items():
            media = MediaStore(tmp_path, max_pixels=width * height)
            assert media.size(ImageRef(name), where="r") == (width, height)
            media = MediaStore(tmp_path, max_pixels=width * height - 1)
            for way in (media.size, media.image):
                with pytest.raises(DataError, match=rf"{width}x{height} pixels, .*data\.image\.max_file_pixels"):
                    way(ImageRef(name), where="r")


# ---- sizes that records say ----


def record_of(folder, raw: dict, bins: int = 8):
    (folder / "a.jsonl").write_text(json.dumps(raw))
    return RecordFile(SourceContext(folder, {}, {}, True, True, bins, 0), path="a.jsonl")[0], MediaStore(folder)


def cornered(**changes) -> dict:
    """A record that `vpt convert` made of an image of 640x480."""
    said = "<|region_token_start|><|x_6|><|y_5|><|x_7|><|y_7|><|region_token_end|>"
    raw = conversation("a.png", [{"role": "assistant", "content": said}, {"role": "user", "content": "<image>"}])
    raw["images"].append("a.png_480,300,640,480")
    return {**raw, "box": [500, 300, 620, 460], **changes}


@pytest.mark.parametrize("bins", [8, 4])
@pytest.mark.parametrize("size", [(1280, 960), (320, 240), (480, 640)])
@pytest.mark.parametrize("known", [{}, {"box": None}, {"image_size": [640, 480]}])
def test_an_image_of_another_size_is_refused(tmp_path, size, bins, known):
    Image.new("RGB", size).save(tmp_path / "a.png")
    with pytest.raises(DataError, match=rf"a\.jsonl:1: .*{size[0]}x{size[1]} pixels.* made for (about )?640x480"):
        record, media = record_of(tmp_path, cornered(**known), bins)
        media.original(record.images["image"][0], where=record.where)


@pytest.mark.parametrize("known", [{}, {"box": None}, {"image_size": [640, 480]}])
@pytest.mark.parametrize("size", [(640, 480), (639, 479)])
def test_an_image_of_the_size_is_read(tmp_path, size, known):
    """Without a recorded size a pixel or two may be missing, which the crop is clipped by."""
    Image.new("RGB", size).save(tmp_path / "a.png")
    record, media = record_of(tmp_path, cornered(**known))
    whole, crop = record.images["image"]
    if known.get("image_size") and size != (640, 480):
        with pytest.raises(DataError, match="639x479 pixels, its record was made for 640x480"):
            media.image(whole, where=record.where)
        return
    assert media.full_resolution(crop, where="r").size == (size[0] - 480, size[1] - 300)
    assert media.image(whole, where="r").size == (512, 384)


@pytest.mark.parametrize("size", [[640], "640x480", [640, 0], [640.5, 480], {"width": 640}])
def test_a_recorded_size_is_two_numbers(tmp_path, size):
    with pytest.raises(DataError, match=r"a\.jsonl:1: `image_size` must be \[width, height\]"):
        record_of(tmp_path, cornered(image_size=size))


# ---- as upstream ----

UPSTREAM = {  # size of a file -> sizes that the upstream code resizes it to, one after the other
    (640, 480): [(512, 384)],
    (480, 640): [(384, 512)],
    (561, 333): [(511, 303)],  # 561 * (512 / 561) is a hair below 512
    (333, 561): [(303, 511)],
    (1001, 667): [(512, 341)],
    (513, 512): [(512, 511)],
    (512, 512): [],
    (301, 207): [],
    (27, 40): [(28, 40)],
    (5, 5): [(28, 28)],
    (20, 3000): [(3, 512), (28, 512)],
    (3000, 20): [(512, 3), (512, 28)],
    (1, 900): [(1, 512), (28, 512)],  # 0 is no side: the upstream code fails here
}
LONG = {(7000, 30): [(5400, 30)], (30, 6000): [], (28, 6000): [(28, 5040)], (20, 7000): [(28, 7000), (28, 5040)]}


@pytest.mark.parametrize(("size", "max_side"), [*((size, 512) for size in UPSTREAM), *((size, 8000) for size in LONG)])
def test_pixels_as_upstream(tmp_path, size, max_side):
    """Crop, limit, least side, ratio, RGB, Qwen's processor, in this order."""
    width, height = size
    pixels = np.random.default_rng(0).integers(0, 255, (height + 9, width + 5, 3)).astype(np.uint8)
    Image.fromarray(pixels).save(tmp_path / "a.png")
    limits = DataConfig(image=ImageConfig(sizing="upstream", max_side=max_side))
    image = media_store(tmp_path, limits).image(ImageRef("a.png", (3, 8, width + 3, height + 8)), where="r")
    want = Image.fromarray(pixels[8 : height + 8, 3 : width + 3])
    for step in (UPSTREAM | LONG)[size]:
        want = want.resize(step, Image.Resampling.NEAREST)
    assert np.array_equal(np.asarray(image), np.asarray(want))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 3136, "longest_edge": 1003520})
    seen = processor(images=[want], return_tensors="pt")["pixel_values"]
    assert np.array_equal(QwenTransform(processor)(image).pixels, seen)


def test_with_less_detail_the_tower_sees_a_coarser_image_in_as_many_tokens():
    image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (90, 180, 3), dtype=np.uint8))
    processor = Qwen2VLImageProcessorPil(size={"shortest_edge": 784, "longest_edge": 1_000_000})
    coarse, plain = QwenTransform(processor, detail=20), QwenTransform(processor)
    blurred = image.resize((20, 10), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)
    assert np.array_equal(coarse(image).pixels, plain(blurred).pixels) and coarse(image).tokens == plain(image).tokens
    assert np.array_equal(coarse.to_token_count(image, 8).pixels, plain.to_token_count(blurred, 8).pixels)
    assert np.array_equal(coarse(small := image.resize((20, 10))).pixels, plain(small).pixels) and repr(coarse) != repr(
        plain
    )


def test_crops_have_a_limit_of_their_own():
    store = MediaStore(Path("nowhere"), max_side=60, crop_max_side=20, render=lambda _: Image.new("RGB", (120, 90)))
    sizes = [store.image(ImageRef("a", crop), where="here").size for crop in (None, (0, 0, 80, 40))]
    assert sizes == [(60, 45), (20, 10)]
    assert replace(store, crop_max_side=None).image(ImageRef("a", (0, 0, 80, 40)), where="here").size == (60, 30)
