"""Positions of every row of a packed batch, against transformers' own `get_rope_index`."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import ALL, FAMILIES, action_turns, mixed_records, qwen_inputs, samples_of, video, video_conversation
from vpt.data.collate import collate
from vpt.data.positions import PositionScheme
from vpt.data.transforms import ProcessedImage
from vpt.perception.batch import VISION_TOWER, PlaceholderSpan
from vpt.perception.mrope import GridSpan, row_positions


def records() -> list[dict]:
    """Several images, crops, every re-encoder, text alone, videos first and last."""
    several = video_conversation(video(), action_turns("clip"), clip_images=["1.png"])
    several["messages"][0]["content"] = "<image>, <video>, <image> and <video>\nis it there?"
    several |= {"images": ["3.png_10,10,150,90", "2.png"], "videos": [video(5, fps=0.5), video(2, fps=1.0)]}
    return [*mixed_records(), several]


@pytest.mark.parametrize("perceived", ["sequential", "grid"])
@pytest.mark.parametrize("family", FAMILIES)
def test_each_row_of_a_packed_batch_has_its_own(make_parts, folder, family, perceived):
    parts = make_parts(*ALL, *FAMILIES[family], f"model.reencoded_positions={perceived}")
    samples = samples_of(parts, folder, records())
    packed = collate(samples).positions.split([len(sample.ids) for sample in samples], dim=1)
    for sample, got in zip(samples, packed):
        inputs = qwen_inputs(parts, sample, perceived_grids=perceived == "grid")
        want, _ = parts.model.qwen.model.get_rope_index(**inputs)
        assert torch.equal(got, want[:, 0]), sample.record.where


def test_sequential_counts_tokens(make_parts, folder):
    """What the authors' training did."""
    parts = make_parts(*ALL, "model.positions=sequential", "model.reencoded_positions=grid")
    for sample in samples_of(parts, folder, records()):
        assert torch.equal(sample.positions, torch.arange(len(sample.ids)).expand(3, -1))


@given(
    steps=st.integers(1, 40), fps=st.sampled_from([0.1, 0.5, 1, 2, 3, 7.3, 24, 29.97, 30, 60]),
    tokens_per_second=st.sampled_from([2, 4, 25]),
)  # fmt: skip
def test_the_temporal_position_of_a_video_is_its_time(steps, fps, tokens_per_second):
    """Rounded down from float32, as the published processor hands seconds to the model."""
    image = ProcessedImage(torch.empty(0), steps * 6, (steps, 4, 6), seconds=2 / fps)
    scheme = PositionScheme(tokens_per_second=tokens_per_second)
    grid = scheme.grid_span(PlaceholderSpan(5, steps * 6, VISION_TOWER, 0), image)
    times = torch.arange(steps) * (tokens_per_second * torch.tensor(2 / fps))
    positions = row_positions(grid.length + 7, [grid])
    assert torch.equal(positions[0, 5:-2].view(steps, 6)[:, 0], 5 + times.long())
    assert positions[:, -2:].tolist() == [[8, 9]] * 3  # 5 + max(2, 3), whatever the time
    assert PositionScheme().grid_span(PlaceholderSpan(5, steps * 6, VISION_TOWER, 0), image) == GridSpan(5, steps, 2, 3)


def test_fractions_of_a_second_as_transformers_has_them(make_parts, folder):
    parts = make_parts("encoder=[]", *FAMILIES["qwen2_5_vl"])
    [sample] = samples_of(parts, folder, [video_conversation(video(fps=1.7))])
    inputs = qwen_inputs(parts, sample)
    want, _ = parts.model.qwen.model.get_rope_index(**inputs)
    whole, _ = parts.model.qwen.model.get_rope_index(**{**inputs, "second_per_grid_ts": torch.tensor([1.0])})
    if torch.equal(want, whole):
        pytest.skip("this version of transformers cuts seconds down to whole ones")
    assert torch.equal(sample.positions, want[:, 0])
