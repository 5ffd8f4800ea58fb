"""Image transforms of the re-encoders, on Pillow and numpy (no torchvision needed)."""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from einops import rearrange
from PIL import Image
from torch import Tensor
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt.data.transforms import RESAMPLING, Extent, ImageTransform, ProcessedImage
from vpt.data.videos import VideoClip
from vpt.perception.batch import VISION_TOWER

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
HALF = (0.5, 0.5, 0.5)


def normalised(image: Image.Image, mean: tuple[float, ...], std: tuple[float, ...]) -> Tensor:
    """RGB image -> [3, H, W], channel-wise standardised."""
    values = torch.from_numpy(np.array(image, dtype=np.float32)) / 255.0
    return ((values - torch.tensor(mean)) / torch.tensor(std)).permute(2, 0, 1).contiguous()


@dataclass(kw_only=True)
class SquareTransform(ImageTransform):
    """A square of `side` pixels.

    Attributes:
        view: `centre` resizes the short side to `resize_to` and cuts the centre out, so that borders go unseen (the
            upstream DINO view); `whole` resizes the image to the square.
        tokens: what one image becomes after the projector.
        resample: how it is resized.
        resize_floats: resize real numbers, without rounding to 256 levels (the published DINOv3 view, whole only).
    """

    name: str = field(kw_only=False)
    side: int = field(kw_only=False)
    tokens: int = field(kw_only=False)
    mean: tuple[float, ...]
    std: tuple[float, ...]
    view: Literal["centre", "whole"] = "whole"
    resize_to: int | None = None
    resample: Literal["bicubic", "bilinear"] = "bicubic"
    resize_floats: bool = False

    def __call__(self, image: Image.Image) -> ProcessedImage:
        if self.resize_floats:
            values = normalised(image, self.mean, self.std)[None]  # the same before as after: resizing is linear
            size = (self.side, self.side)
            resized = torch.nn.functional.interpolate(values, size, mode=self.resample, antialias=True)
            return ProcessedImage(resized[0].contiguous(), self.tokens)
        if self.view == "whole":
            square = image.resize((self.side, self.side), RESAMPLING[self.resample])
        else:
            square = self._centre(image)
        return ProcessedImage(normalised(square, self.mean, self.std), self.tokens)

    def coverage(self, size: tuple[int, int]) -> Extent:
        if self.view == "whole":
            return super().coverage(size)
        width, height = self._resized(size)
        across, down = size[0] / width, size[1] / height
        left, top = (width - self.side) // 2, (height - self.side) // 2
        return left * across, top * down, (left + self.side) * across, (top + self.side) * down

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        short = self.resize_to or self.side
        width, height = size
        # The long side is cut, not rounded, as transformers' processors do.
        return (short, int(short * height / width)) if width <= height else (int(short * width / height), short)

    def _centre(self, image: Image.Image) -> Image.Image:
        size = self._resized(image.size)
        image = image.resize(size, RESAMPLING[self.resample])
        left, top = (size[0] - self.side) // 2, (size[1] - self.side) // 2
        return image.crop((left, top, left + self.side, top + self.side))


@dataclass
class ResizeLongestSide(ImageTransform):
    """The long side resized to `side`, the rest padded with zeros right and below (SAM)."""

    name: str
    side: int
    tokens: int

    def coverage(self, size: tuple[int, int]) -> Extent:
        width, height = self._resized(size)
        return 0.0, 0.0, self.side * size[0] / width, self.side * size[1] / height

    def _resized(self, size: tuple[int, int]) -> tuple[int, int]:
        scale = self.side / max(size)
        width, height = (max(int(extent * scale + 0.5), 1) for extent in size)
        return width, height

    def __call__(self, image: Image.Image) -> ProcessedImage:
        width, height = self._resized(image.size)
        pixels = normalised(image.resize((width, height), Image.Resampling.BILINEAR), IMAGENET_MEAN, IMAGENET_STD)
        return ProcessedImage(
            torch.nn.functional.pad(pixels, (0, self.side - width, 0, self.side - height)), self.tokens
        )


class QwenTransform(ImageTransform):
    """The transform of Qwen's own tower, by transformers' Pillow image processor."""

    name = VISION_TOWER

    def __init__(
        self, processor: Qwen2VLImageProcessorPil, *, video_size: Mapping[str, int] | None = None,
        video_pixels: int | None = None, detail: int | None = None,
    ) -> None:  # fmt: skip
        """`video_size`: the processor's `size` for frames of videos, by default that for images; `video_pixels`: the
        most of all frames together; `detail`: pixels that are to be seen along the long side, whatever its tokens."""
        self.processor, self.video_size = processor, dict(video_size or processor.size)
        self.video_pixels, self.detail = video_pixels, detail

    def to_token_count(self, image: Image.Image, tokens: int) -> ProcessedImage:
        cell = self.processor.patch_size * self.processor.merge_size
        width, height = nearest_grid(image.size, tokens)
        resized = self._coarse(image).resize((width * cell, height * cell), Image.Resampling.BICUBIC)
        out = self.processor(images=[resized], do_resize=False, return_tensors="pt")
        return self._processed(out["pixel_values"], out["image_grid_thw"][0].tolist())

    def __call__(self, image: Image.Image) -> ProcessedImage:
        out = self.processor(images=[self._coarse(image)], return_tensors="pt")
        return self._processed(out["pixel_values"], out["image_grid_thw"][0].tolist())

    def _coarse(self, image: Image.Image) -> Image.Image:
        """The image with no more than `detail` to be seen of it."""
        if self.detail is None or max(image.size) <= self.detail:
            return image
        scale = self.detail / max(image.size)
        width, height = (max(round(extent * scale), 1) for extent in image.size)
        return image.resize((width, height), Image.Resampling.BICUBIC).resize(image.size, Image.Resampling.BICUBIC)

    def video(self, clip: VideoClip) -> ProcessedImage:
        """Each patch holds `temporal_patch_size` frames; the last frame is repeated where they do not come out even."""
        slots = self.processor.temporal_patch_size
        frames = [*clip.frames, *clip.frames[-1:] * (-len(clip.frames) % slots)]
        out = self._frames(frames)
        grid = [len(frames) // slots, *out["image_grid_thw"][0].tolist()[1:]]
        # The processor takes a frame for a still, the same in every slot of its patches: slot k comes from frame k.
        stills = rearrange(out["pixel_values"], "(t k n) (c s p) -> t k n c s p", t=grid[0], k=slots, s=slots, c=3)
        patches = torch.stack([stills[:, k, :, :, k] for k in range(slots)], dim=3)
        return self._processed(rearrange(patches, "t n c s p -> (t n) (c s p)"), grid, seconds=slots / clip.fps)

    def _frames(self, frames: list[Image.Image]) -> Any:
        """Frames, each as if it were an image."""
        return self.processor(images=frames, size=self.video_size, return_tensors="pt")

    def _processed(self, pixels: Tensor, grid: list[int], *, seconds: float | None = None) -> ProcessedImage:
        time, height, width = grid
        tokens = time * height * width // self.processor.merge_size**2
        return ProcessedImage(pixels, tokens, (time, height, width), seconds)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.processor.to_json_string()}, detail={self.detail})"


def nearest_grid(size: tuple[int, int], tokens: int) -> tuple[int, int]:
    """Columns and rows of a grid with about `tokens` cells and the proportions of an image of `size`.

    Each side is one of the two whole numbers beside the exact one; of these grids the one whose number of cells is
    nearest, and of several the one that distorts the image least.
    """
    width, height = size
    exact = math.sqrt(tokens * width / height), math.sqrt(tokens * height / width)
    sides = [{max(math.floor(side), 1), max(math.ceil(side), 1)} for side in exact]

    def error(grid: tuple[int, int]) -> tuple[int, float]:
        columns, rows = grid
        return abs(columns * rows - tokens), abs(math.log(columns * height / (rows * width)))

    return min(((columns, rows) for columns in sides[0] for rows in sides[1]), key=error)
