"""Visual tokens of processed images where no batch of rows refers to them: decoding, similarity maps, ablations."""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from vpt.data.collate import stack_images
from vpt.data.transforms import ProcessedImage
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER

# Of images that a re-encoder sees at a time: the bias of SAM's global attention takes a gigabyte per image of 1024 px.
MICRO_BATCH_PIXELS = 8 * 1024**2


def image_tokens(model: VPTModel, source: str, images: Sequence[ProcessedImage]) -> Tensor:
    """[tokens, D], unconditioned, image after image, through the tower or a re-encoder and its projector.

    Features that images bring from the feature cache are not computed again.
    """
    transform = model.transform_of(source)
    tokens = []
    for chosen in [images] if transform == VISION_TOWER else _micro_batches(images):
        inputs = stack_images(transform, chosen).map(lambda tensor: tensor.to(model.device))
        features = model.encode_images({transform: inputs})[transform]
        tokens.append(features if source == VISION_TOWER else model.encoder(source).projector.project(features))
    return torch.cat(tokens)


def _micro_batches(images: Sequence[ProcessedImage]) -> Iterator[Sequence[ProcessedImage]]:
    """Images of one size, a few at a time."""
    pixels = max(image.pixels.shape[-2:].numel() for image in images)
    at_once = max(1, MICRO_BATCH_PIXELS // max(1, pixels))
    return (images[first : first + at_once] for first in range(0, len(images), at_once))
