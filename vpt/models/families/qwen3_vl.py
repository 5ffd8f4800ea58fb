"""Qwen3-VL, dense: DeepStack, learned positions in the tower, no windows, timestamps between the frames of a video."""

from dataclasses import replace
from functools import lru_cache
from math import inf
from typing import Any

import torch
from PIL import Image
from torch import Tensor, nn
from transformers import Qwen3VLConfig
from transformers.models.qwen3_vl.video_processing_qwen3_vl import smart_resize
from transformers.vision_utils import get_vision_interpolation_indices_and_weights

from vpt.config.schema import VideoConfig
from vpt.data.transforms import ProcessedImage
from vpt.data.videos import VideoClip
from vpt.encoders.transforms import HALF, QwenTransform
from vpt.models.families.base import Family
from vpt.perception.batch import Grid


class Qwen3Transform(QwenTransform):
    """A video is written step by step, each step an image with its time before it."""

    def video(self, clip: VideoClip) -> ProcessedImage:
        slots = self.processor.temporal_patch_size
        times = [*(clip.times or [number / clip.fps for number in range(len(clip.frames))])]
        times += times[-1:] * (-len(times) % slots)
        middles = [(first + last) / 2 for first, last in zip(times[::slots], times[slots - 1 :: slots])]
        return replace(super().video(clip), captions=tuple(f"<{middle:.1f} seconds>" for middle in middles))

    def _frames(self, frames: list[Image.Image]) -> Any:
        """Limits count over all frames, and frames keep the proportions of the first."""
        count, (width, height) = len(frames), frames[0].size
        rows, columns = smart_resize(
            count, height, width, temporal_factor=self.processor.temporal_patch_size,
            factor=self.processor.patch_size * self.processor.merge_size,
            min_pixels=count * self.video_size["shortest_edge"],
            max_pixels=min(count * self.video_size["longest_edge"], self.video_pixels or inf),
        )  # fmt: skip
        resized = [frame.resize((columns, rows), Image.Resampling.BICUBIC) for frame in frames]
        return self.processor(images=resized, do_resize=False, return_tensors="pt")


class Qwen3VL(Family):
    """Its deep features are added to the first layers of the language model (`vpt.models.inner_forward`)."""

    name, title, config_class = "qwen3_vl", "Qwen3-VL", Qwen3VLConfig
    system_prompt, thinks = None, True
    pixels, video_pixels = (65_536, 16_777_216), 25_165_824
    mean = std = HALF
    processor_class = "Qwen3VLProcessor"
    transform_class = Qwen3Transform

    def video_settings(self, videos: VideoConfig, *, side: int) -> dict[str, Any]:
        size = {"shortest_edge": videos.min_pixels, "longest_edge": videos.total_pixels}
        return {"video_processor_type": "Qwen3VLVideoProcessor", "size": size, "cap_pixels_per_frame": True,
                "max_video_tokens": videos.max_pixels // side**2}  # fmt: skip

    def added_positions(self, tower: Any, grids: list[Grid]) -> Tensor:
        side, merge = int(tower.config.num_position_embeddings**0.5), tower.config.spatial_merge_size
        taps, weights = zip(*(_interpolation(grid, side, merge) for grid in grids), strict=True)
        device = tower.pos_embed.weight.device
        index, share = torch.cat(taps).to(device), torch.cat(weights).to(device)
        added: Tensor = sum(tower.pos_embed(index[:, tap]) * share[:, tap, None] for tap in range(index.shape[1]))
        return added

    def deep_mergers(self, tower: Any) -> dict[int, nn.Module]:
        return dict(sorted(zip(tower.config.deepstack_visual_indexes, tower.deepstack_merger_list, strict=True)))


@lru_cache(maxsize=4096)
def _interpolation(grid: Grid, side: int, merge: int) -> tuple[Tensor, Tensor]:
    """[patches, 4] each: entries of a `side` x `side` table of positions that a patch lies between, their weights."""
    return get_vision_interpolation_indices_and_weights(
        torch.tensor([grid]), num_grid_per_side=side, mode="bilinear", align_corners=True, spatial_merge_size=merge
    )
