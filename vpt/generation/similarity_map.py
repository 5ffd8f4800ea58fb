"""Similarity of every re-encoded token to the control state's direction, f . c, over the image."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.data.images import MediaStore
from vpt.data.processor import Processor
from vpt.generation.row_state import Answer, PerceptionStep
from vpt.models.build import ModelBundle
from vpt.models.image_tokens import image_tokens
from vpt.models.vpt import VPTModel


@dataclass(frozen=True)
class SimilarityMap:
    """Attributes:
    values: [rows, columns], f . c for each token f of the encoder's grid and the direction c that the control state
        gave: how much of c was added to the token (`vpt.encoders.projectors`).
    extent: x0, y0, x1, y1 in pixels of the image that the grid covers; beyond the image where the transform pads it.
    """

    values: np.ndarray
    extent: tuple[float, float, float, float]

    def scaled(self, across: float, down: float) -> "SimilarityMap":
        """This map over an image that is so many times as wide and as high."""
        x0, y0, x1, y1 = self.extent
        return SimilarityMap(self.values, (x0 * across, y0 * down, x1 * across, y1 * down))


@torch.no_grad()
def similarity_map(
    model: VPTModel, processor: Processor, kind: str, image: Image.Image, states: Tensor
) -> SimilarityMap:
    """The map of an action: its image encoded again, each token times its direction.

    Args:
        model, processor: as they answered.
        kind: the re-encoder.
        image: as it was re-encoded, limited in size.
        states: [s, D], the control states of the action.
    """
    transform = processor.transforms[kind]
    processed = transform(image)
    projector = model.encoder(kind).projector
    with model.autocast():
        tokens = image_tokens(model, kind, [processed])
        direction = projector.condition_vector(states[None].to(model.device))[0]
    rows, columns = processor.position_scheme.grid_shape(processed)
    values = (tokens[:, : len(direction)].float() * direction.float()).sum(-1).view(rows, columns).cpu().numpy()
    return SimilarityMap(values, transform.coverage(image.size))


def similarity_maps(
    bundle: ModelBundle, answer: Answer, media: MediaStore, image: Image.Image
) -> list[SimilarityMap | None]:
    """The map of each step of an answer's trace; None where no control state conditioned what was seen.

    Args:
        bundle: the model that answered.
        answer: about `image`, given at full resolution.
        media: limits the image in size, as when it was answered.
    """
    states = iter(answer.states)
    return [
        step_map(bundle, step, next(states) if step.state_norm is not None else None, media, image)
        for step in answer.trace
    ]


def step_map(
    bundle: ModelBundle, step: PerceptionStep, states: Tensor | None, media: MediaStore, image: Image.Image
) -> SimilarityMap | None:
    """The map of one step, whose control states are [s, D], over `image` at full resolution."""
    if states is None or bundle.model.forward_config.num_inner_forward_run == 1:
        return None
    limited = media.resize(image)
    found = similarity_map(bundle.model, bundle.processor, step.kind, limited, states)
    return found.scaled(image.width / limited.width, image.height / limited.height)
