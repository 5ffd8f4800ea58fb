"""`Family`, the contract of base models: all that differs between Qwen2-VL and its successors.

To add one: a file beside this one, its name in `vpt/models/families/__init__.py`, and `conf/model/NAME.yaml`. Nothing
else asks which family a model is of.
"""

from collections.abc import Container
from typing import Any, ClassVar

from torch import Tensor
from transformers import PreTrainedConfig
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

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
    """

    name: ClassVar[str]
    title: ClassVar[str]
    config_class: ClassVar[type[PreTrainedConfig]]
    upstream: ClassVar[bool] = False

    def windows(self, vision: Any, grid: Grid) -> Windows | None:
        """The windows that blocks outside `whole_blocks` attend within; None where there are no such blocks."""
        return None

    def whole_blocks(self, vision: Any) -> Container[int]:
        """Blocks of the tower whose patches attend to the whole frame."""
        return range(vision.depth)

    def tokens_per_second(self, vision: Any) -> float | None:
        """Temporal positions that a second of video takes; None where each step of its grid takes one."""
        return None

    def image_processor(self, vision: Any, size: dict[str, int]) -> Qwen2VLImageProcessorPil:
        """transformers' Pillow image processor for patches of the tower, images limited to `size`."""
        return Qwen2VLImageProcessorPil(
            patch_size=vision.patch_size,
            merge_size=vision.spatial_merge_size,
            temporal_patch_size=vision.temporal_patch_size,
            size=size,
        )
