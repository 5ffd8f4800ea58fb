"""Videos: records, sampling, files, patches; and a run that trains, evaluates and answers with them."""

import json
import shutil
import sys
from itertools import pairwise
from pathlib import Path

import av
import numpy as np
import pytest
import torch
from einops import rearrange
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from conftest import (
    REGION_TURNS,
    TOKENS,
    action_turns,
    compose_config,
    conversation,
    mixed_records,
    samples_of,
    video,
    video_conversation,
)  # fmt: skip
from vpt.cli.train import train
from vpt.data.images import MediaStore
from vpt.data.rebin import rebin
from vpt.data.records import parse_record
from vpt.data.references import ImageRef, VideoRef
from vpt.data.same_data import without_perception
from vpt.data.videos import FrameSampling, VideoClip
from vpt.encoders.transforms import CLIP_MEAN, CLIP_STD
from vpt.errors import DataError


def read(record: dict):
    return parse_record(record, where="train.jsonl:7", encoder_tokens=TOKENS)


def test_images_and_videos_keep_the_order_of_their_placeholders():
    record = video_conversation(video(2))
    record["messages"][0]["content"] = "<image>, <video>, <image> and <video>?"
    record |= {"images": ["0.png", "1.png_1,2,3,4"], "videos": [video(2), "a.mp4"]}
    frames = VideoRef((ImageRef("frame0.png"), ImageRef("frame1.png")), 2.0)
    seen = read(record).images["image"]
    assert seen == (ImageRef("0.png"), frames, ImageRef("1.png", (1, 2, 3, 4)), VideoRef((ImageRef("a.mp4"),)))
    assert [reference.as_json() for reference in seen] == ["0.png", video(2), "1.png_1,2,3,4", "a.mp4"]
    assert [str(reference.frame) for reference in seen] == ["0.png", "frame1.png", "1.png_1,2,3,4", "a.mp4"]


def test_the_baselines_keep_the_video():
    record = read(video_conversation(video(), action_turns("seg"), seg_images=["0.png"]))
    plain = without_perception(record, TOKENS)
    assert [message.role for message in plain.messages] == ["system", "user", "assistant"]
    assert plain.images == {"image": record.images["image"]}
    images = without_perception(record, TOKENS, token_matched_images=True).images["image"]
    assert images[0] == record.images["image"][0] and images[1].path == "frame3.png"


def test_a_region_is_answered_by_its_crop(folder):
    record = video_conversation(video(), REGION_TURNS)
    record["messages"][2]["content"] = "<video>"
    record["videos"] = [video(), video(2)]
    with pytest.raises(DataError, match="a video follows, not its crop"):
        rebin(read(record), TOKENS, folder, source_bins=8, bins=4)
    record["messages"][2]["content"] = "<image>"
    record |= {"videos": [video()], "images": ["frame3.png_0,0,80,48"]}
    _, crop = rebin(read(record), TOKENS, folder, source_bins=8, bins=4).images["image"]
    assert crop == ImageRef("frame3.png", (0, 12, 60, 48))  # columns 0 to 2, rows 1 to 3 of 4 x 4 over 80 x 48


BAD_VIDEOS = {
    "more placeholders than videos": ({"videos": []}, r"1 placeholder\(s\) <video> but 0 entries in `videos`"),
    "more videos": ({"videos": [video(), video()]}, r"1 placeholder\(s\) <video> but 2"),
    "an image instead": ({"videos": [], "images": ["0.png"]}, "placeholder"),
    "no list": ({"videos": "a.mp4"}, "`videos` must be a list"),
    "no frames": ({"videos": [{"frames": [], "fps": 2}]}, "at least one entry"),
    "frames that are no paths": ({"videos": [{"frames": [3], "fps": 2}]}, "`frames` must be a list of paths"),
    "no rate": ({"videos": [{"frames": ["frame0.png"]}]}, r'must be \{"frames": \[image paths\], "fps": number\}'),
    "a key too many": ({"videos": [{**video(), "fsp": 2}]}, "must be"),
    "rate 0": ({"videos": [video(fps=0)]}, "`fps` is 0; it must be the frames in a second, from 0.001 to 1000"),
    "a negative rate": ({"videos": [video(fps=-1)]}, "from 0.001 to 1000"),
    "a rate in words": ({"videos": [{**video(), "fps": "2"}]}, "from 0.001 to 1000"),
    "an endless rate": ({"videos": [video(fps=float("inf"))]}, "from 0.001 to 1000"),
    "a frame that leaves the root": ({"videos": [{"frames": ["../0.png"], "fps": 2}]}, "leaves data.root"),
    "a file that leaves the root": ({"videos": ["/etc/a.mp4"]}, "leaves data.root"),
    "a video among images": ({"videos": [video()], "images": [video()]}, "placeholder"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_VIDEOS)
def test_bad_videos_say_where_and_what(name):
    changes, message = BAD_VIDEOS[name]
    with pytest.raises(DataError, match=message) as error:
        read({**video_conversation(video()), **changes})
    assert str(error.value).startswith("train.jsonl:7")


@given(st.integers(1, 5000), st.floats(0.1, 240), st.floats(0.1, 60), st.integers(1, 64))
def test_sampled_frames_are_spread_evenly(total, rate, wanted, most):
    numbers, fps = FrameSampling(wanted, most).frame_indices(total, rate)
    assert 1 <= len(numbers) <= min(total, most) and numbers[0] == 0 and numbers[-1] < total
    steps = {b - a for a, b in pairwise(numbers)}
    assert not steps or (min(steps) >= 1 and max(steps) - min(steps) <= 1)
    assert len(numbers) / fps == pytest.approx(total / rate)  # as long as the video
    if rate <= wanted and total <= most:
        assert numbers == list(range(total)) and fps == pytest.approx(rate)
    if len(numbers) > 1 and len(numbers) < most:
        assert fps <= wanted * 1.5 or fps == pytest.approx(rate)


@pytest.mark.parametrize("count", [1, 2, 5])
@pytest.mark.parametrize("model", ["tiny", "tiny_2_5"])
def test_patches_hold_the_frames_in_turn(make_parts, count, model):
    """Put together again, patches show every frame, the last one twice where the count is odd."""
    view = make_parts("encoder=[]", f"model={model}").processor.transforms["image"]
    frames = np.random.default_rng(0).integers(0, 255, (count, 64, 96, 3)).astype(np.uint8)
    processed = view.video(VideoClip([Image.fromarray(frame) for frame in frames], fps=4.0))
    steps = (count + 1) // 2
    assert processed.grid == (steps, 8, 12) and processed.tokens == steps * 4 * 6 and processed.seconds == 0.5
    got = rearrange(
        processed.pixels, "(t h w a b) (c s y x) -> (t s) (h a y) (w b x) c",
        t=steps, h=4, w=6, a=2, b=2, c=3, s=2, y=8, x=8,
    )  # fmt: skip
    want = (torch.from_numpy(frames).float() / 255 - torch.tensor(CLIP_MEAN)) / torch.tensor(CLIP_STD)
    torch.testing.assert_close(got, torch.cat([want, want[-1:]])[: 2 * steps], rtol=1e-5, atol=1e-5)


def test_frames_follow_the_first_ones_size_and_the_limits(make_parts, folder):
    parts = make_parts("encoder=[]", "data.video.max_pixels=4096", "data.video.min_pixels=256")
    shown = {"frames": ["frame0.png", "3.png", "0.png"], "fps": 1}
    sizes = [frame.size for frame in folder.video(read(video_conversation(shown)).images["image"][0], where="").frames]
    assert sizes == [(80, 48)] * 3
    [sample] = samples_of(parts, folder, [video_conversation(shown)])
    time, height, width = sample.images["image"][0][1].grid
    assert time == 2 and height * width * 64 <= 4096
    text = parts.tokenizer.decode(sample.ids)
    assert "<|vision_start|><|video_pad|>" in text and text.count("<|video_pad|>") == time * height * width // 4
    assert "<|image_pad|>" not in text


def write_video(path: Path, frames: list[Image.Image], rate: int) -> None:
    """A lossless file."""
    with av.open(str(path), "w") as container:
        stream = container.add_stream("ffv1", rate=rate, width=frames[0].width, height=frames[0].height)
        stream.pix_fmt = "bgr0"
        for frame in frames:
            container.mux(stream.encode(av.VideoFrame.from_image(frame)))
        container.mux(stream.encode())


@pytest.fixture(scope="module")
def filmed(tmp_path_factory, folder) -> MediaStore:
    """The folder's frames, and the same as video files."""
    root = tmp_path_factory.mktemp("videos")
    for path in Path(folder.root).iterdir():
        shutil.copy(path, root)
    frames = [Image.open(root / f"frame{number}.png") for number in range(7)]
    write_video(root / "a.mkv", frames, 2)
    write_video(root / "fast.avi", [frame for frame in frames for _ in range(5)], 10)
    return MediaStore(root)


@pytest.mark.parametrize("name", ["a.mkv", "fast.avi"])
def test_a_file_is_its_frames(make_parts, filmed, name):
    """Sampled to `data.video.fps`, whatever its own rate."""
    parts = make_parts("encoder=[]", "model=tiny_2_5")
    listed, file = samples_of(parts, filmed, [video_conversation(video()), video_conversation(name)])
    (_, a), (_, b) = listed.images["image"][0], file.images["image"][0]
    assert a.grid == b.grid and a.seconds == pytest.approx(b.seconds)
    assert torch.equal(a.pixels, b.pixels) and torch.equal(listed.positions, file.positions)
    still = filmed.original(VideoRef((ImageRef(name),)).frame, where="")
    middle = filmed.original(ImageRef("frame3.png"), where="")
    assert np.array_equal(np.asarray(still), np.asarray(middle))


def test_max_frames_bounds_a_file(filmed):
    folder = MediaStore(filmed.root, sampling=FrameSampling(fps=10, max_frames=3))
    footage = folder.video(VideoRef((ImageRef("fast.avi"),)), where="")
    assert len(footage.frames) == 3 and footage.fps == pytest.approx(3 / 3.5)


BAD_FILES = {
    "missing": (lambda path: None, "does not exist; is data.root="),
    "text": (lambda path: path.write_text("no video"), "cannot be read"),
    "cut short": (lambda path: path.write_bytes((path.parent / "ok.mkv").read_bytes()[:700]), "cannot be read|frames at|ends"),
    "sound alone": (lambda path: write_sound(path), "it holds no video"),
}  # fmt: skip


def write_sound(path: Path) -> None:
    with av.open(str(path), "w", format="wav") as container:
        stream = container.add_stream("pcm_s16le", rate=8000, layout="mono")
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 800), dtype=np.int16), layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))


@pytest.mark.parametrize("name", BAD_FILES)
def test_bad_files_say_path_and_record(tmp_path, name):
    make, message = BAD_FILES[name]
    write_video(tmp_path / "ok.mkv", [Image.new("RGB", (64, 64), (i, 9, 9)) for i in range(20)], 2)
    make(tmp_path / "a.mkv")
    with pytest.raises(DataError, match=message) as error:
        MediaStore(tmp_path).video(VideoRef.read("a.mkv", ""), where="train.jsonl:7")
    assert "train.jsonl:7" in str(error.value) and "a.mkv" in str(error.value)


def test_missing_frames_large_frames_and_links_are_refused(tmp_path, filmed):
    with pytest.raises(DataError, match=r"frame9\.png does not exist"):
        filmed.video(VideoRef.read({"frames": ["frame9.png"], "fps": 1}, ""), where="r")
    with pytest.raises(DataError, match="80x48 pixels, allowed are 1 to 100"):
        MediaStore(filmed.root, max_pixels=100).video(VideoRef.read("a.mkv", ""), where="r")
    (tmp_path / "a.mkv").symlink_to(Path(filmed.root) / "a.mkv")
    with pytest.raises(DataError, match="a link that leaves"):
        MediaStore(tmp_path).video(VideoRef.read("a.mkv", ""), where="r")


def test_without_pyav_the_error_says_what_to_install(filmed, monkeypatch):
    monkeypatch.setitem(sys.modules, "av", None)
    with pytest.raises(DataError, match=r"train\.jsonl:7: .*a\.mkv needs PyAV; type: pip install av"):
        filmed.video(VideoRef.read("a.mkv", ""), where="train.jsonl:7")


def test_a_run_on_videos(filmed, tmp_path):
    """Data workers, packing, cache, teacher-forced evaluation, answering, pictures."""
    records = [
        video_conversation(video(), action_turns("detection"), detection_images=["frame3.png"]),
        video_conversation("a.mkv", action_turns("detection"), answer="no", detection_images=["a.mkv"]),
        conversation("0.png", answer="red"),
        *(record for record in mixed_records() if not record.keys() & {"clip_images", "seg_images"}),
    ]
    for split in ("train", "test"):
        (Path(filmed.root) / f"{split}.json").write_text(json.dumps(records))
    config = compose_config(
        "+debug=two_steps", "data=vpt", f"data.root={filmed.root}", "encoder=[dino]", "model=tiny_2_5",
        "data.workers=1", "data.limit=4", "tracking=none", "training.batch_size=6", "training.micro_batch_size=3",
    )  # fmt: skip
    train(config, tmp_path / "run")
    summary = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert summary["questions"] == 4 and summary["teacher_forced"]["loss"] > 0
    lines = [json.loads(line) for line in (tmp_path / "run" / "predictions" / "predictions.jsonl").open()]
    assert [line["images"]["image"] for line in lines[:3]] == [[video()], ["a.mkv"], ["0.png"]]

    from vpt.reporting.figures import draw_sheet

    assert draw_sheet(tmp_path / "run" / "predictions", config, columns=2, rows=2).stat().st_size > 10_000
