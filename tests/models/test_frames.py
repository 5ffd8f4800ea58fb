"""`encoder.X.frames`: a re-encoder takes the middle frame of a video, all of its frames, or some."""

import pytest
import torch

from conftest import action_turns, samples_of, video, video_conversation
from helpers.gradients import MODEST, assert_same, losses_and_gradients
from vpt.config.schema import GenerationConfig
from vpt.data.collate import collate
from vpt.data.videos import VideoClip, chosen_frames
from vpt.errors import ConfigError
from vpt.flops.meter import FlopMeter
from vpt.generation.generator import Generator

SETTINGS = ("model=tiny_3", "encoder=[dino,sam,clip]", "encoder.dino.frames=3", "encoder.sam.frames=all",
            "encoder.clip.frames=all", "model.reencoded_positions=grid", "data.max_length=2048")  # fmt: skip


@pytest.mark.parametrize(
    ("total", "frames", "numbers"),
    [(7, "all", range(7)), (7, "3", [1, 3, 5]), (7, "1", [3]), (2, "5", [0, 1]), (16, "4", [2, 6, 10, 14])],
)
def test_frames_are_evenly_spread(total, frames, numbers):
    clip = chosen_frames(VideoClip([*range(total)], 2.0, [number / 2 for number in range(total)]), frames)
    assert clip.frames == [*numbers]
    assert clip.times == [number / 2 for number in numbers]
    assert clip.fps == 2.0 * len(numbers) / total


@pytest.fixture(scope="module")
def parts(make_parts):
    return make_parts(*SETTINGS, *MODEST)


@pytest.fixture(scope="module")
def sample(parts, folder):
    """A video of seven frames, encoded again by three re-encoders."""
    turns = [action_turns(token) for token in ("detection", "seg", "clip")]
    shown = {f"{token}_images": [video()] for token in ("detection", "seg", "clip")}
    return samples_of(parts, folder, [video_conversation(video(), *turns, **shown)])[0]


def test_tokens_and_positions(parts, sample):
    """A token for each patch of each frame; as a grid, frames advance in time. The tower takes two frames a step."""
    by_source = {block.source: block for block in sample.row.blocks if block.source != "image"}
    assert {source: block.length for source, block in by_source.items()} == {
        "dino": 3 * 16,
        "sam": 7 * 16,
        "clip": 4 * 15,
    }
    for source, steps in {"dino": 3, "sam": 7, "clip": 4}.items():
        block = by_source[source]
        times = sample.positions[0, block.start : block.start + block.length]
        assert times.unique().tolist() == [*range(times[0], times[0] + steps)]


@torch.no_grad()
def test_features_are_those_of_each_frame(parts, folder, sample):
    images = collate([sample]).images
    features = parts.model.encode_images({name: images[name] for name in ("dino", "sam")})
    frames = folder.video(sample.record.images["dino"][0], where="").frames
    for source, numbers in {"dino": [1, 3, 5], "sam": range(7)}.items():
        transform = parts.processor.transforms[source]
        pixels = torch.stack([transform(frames[number]).pixels for number in numbers])
        torch.testing.assert_close(features[source], parts.model.encoder(source).forward_features(pixels))


def test_shared_equals_full(parts, sample):
    batch = collate([sample])
    assert_same(losses_and_gradients(parts, batch, "shared"), losses_and_gradients(parts, batch, "full"))
    once = FlopMeter(parts.model).encoders["dino"].vision
    assert FlopMeter(parts.model).step(batch)["encoders.dino.vision"] == once * 3


def test_an_answer_looks_at_as_many_frames(parts, folder, sample):
    settings = GenerationConfig(action="sam", max_new_tokens=20)
    generator = Generator.from_config(parts.model, parts.processor, parts.tokenizer, settings)
    [answer] = generator.generate([parts.processor.encode_prompt(sample.record, folder)], [folder])
    assert answer.trace[0].visual_tokens == 7 * 16


def test_a_number_that_is_none(make_parts):
    with pytest.raises(ConfigError, match=r"encoder\.dino\.frames=first is not middle, all, or a number"):
        make_parts("encoder.dino.frames=first")
