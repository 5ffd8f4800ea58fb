"""`Family`, the contract of base models: all that differs between Qwen2-VL and its successors.

To add one: a file beside this one, its name in `vpt/models/families/__init__.py`, and `conf/model/NAME.yaml`. Besides,
only the check of `model.path` (`vpt/config/validate.py`) asks which family a model is of.
"""

from collections.abc import Container
from typing import Any, ClassVar

from torch import Tensor, nn
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from vpt.config.schema import ImageConfig, VideoConfig
from vpt.data.records import SYSTEM_PROMPT
from vpt.encoders.transforms import CLIP_MEAN, CLIP_STD, QwenTransform
from vpt.perception.batch import Grid

# The order of the merged positions of one image, and how many patches each run of them has
Windows = tuple[Tensor, tuple[int, ...]]


class Family:
    """What Qwen2-VL does; other families say where they differ. It has no state: one instance serves every model.

    Attributes:
        name: transformers' model type, `model.family` of the configuration.
        title: how it is called in text.
        config_class: transformers' configuration of the whole model.
        upstream: whether the paper's authors publish checkpoints of this family (`vpt.checkpoint.upstream`).
        system_prompt: of conversations that have none; None: they begin with the user.
        thinks: whether there is an edition that thinks before it answers (`model.thinking`).
        pixels: the fewest and the most of an image, where no folder says so.
        mean, std: of images, by channel, likewise.
        video_pixels: the most of all frames of a video together, likewise; None: each frame is limited alone.
        processor_class: transformers' name of it, for folders that are exported.
        transform_class: of the tower's image transform.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    upstream: ClassVar[bool] = False
    system_prompt: ClassVar[str | None] = SYSTEM_PROMPT
    thinks: ClassVar[bool] = False
    pixels: ClassVar[tuple[int, int]] = (56 * 56, 28 * 28 * 1280)
    mean: ClassVar[tuple[float, ...]] = CLIP_MEAN
    std: ClassVar[tuple[float, ...]] = CLIP_STD
    video_pixels: ClassVar[int | None] = None
    processor_class: ClassVar[str]
    transform_class: ClassVar[type[QwenTransform]] = QwenTransform

    def video_settings(self, videos: VideoConfig, *, side: int) -> dict[str, Any]:
        """The limits of frames as transformers' video processor has them; a token has `side` x `side` pixels."""
        size = {"shortest_edge": videos.min_pixels, "longest_edge": videos.max_pixels}
        return {"video_processor_type": "Qwen2VLVideoProcessor", "size": size}

    def windows(self, vision: Any, grid: Grid) -> Windows | None:
        """The windows that blocks outside `whole_blocks` attend within; None where there are no such blocks."""
        return None

    def whole_blocks(self, vision: Any) -> Container[int]:
        """Blocks of the tower whose patches attend to the whole frame."""
        return range(vision.depth)

    def tokens_per_second(self, vision: Any) -> float | None:
        """Temporal positions that a second of video takes; None where each step of its grid takes one."""
        return None

    def added_positions(self, tower: Any, grids: list[Grid]) -> Tensor | None:
        """Learned positions of patches, [patches, width of the tower], added before its first block; None for none."""
        return None

    def deep_mergers(self, tower: Any) -> dict[int, nn.Module]:
        """DeepStack: block -> what makes deep features, [positions, D], of its output; in the order of the blocks."""
        return {}

    def transform(self, vision: Any, images: ImageConfig, videos: VideoConfig) -> QwenTransform:
        """The tower's image transform, by transformers' Pillow processor; nothing is open in `images` and `videos`."""
        processor = Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size={"shortest_edge": images.min_pixels, "longest_edge": images.max_pixels},
            image_mean=images.mean,
            image_std=images.std,
        )
        video_size = {"shortest_edge": videos.min_pixels, "longest_edge": videos.max_pixels}
        return self.transform_class(
            processor, video_size=video_size, video_pixels=videos.total_pixels, detail=images.detail
        )
