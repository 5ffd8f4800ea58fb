"""Similarity of every re-encoded token to the control state's direction, f . c, over the image."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.data.collate import stack_images
from vpt.data.images import MediaStore
from vpt.data.processor import Processor
from vpt.generation.row_state import Answer
from vpt.models.build import ModelBundle
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
        kind: the re-processor.
        image: as it was re-encoded, limited in size.
        states: [s, D], the control states of the action.
    """
    transform = processor.transforms[kind]
    processed = transform(image)
    images = stack_images(transform.name, [processed])
    images.pixels = images.pixels.to(model.device)
    features = model.encode_images({model.transform_of(kind): images})[model.transform_of(kind)]
    projector = model.encoder(kind).projector
    tokens, direction = projector.project(features), projector.condition_vector(states[None].to(model.device))[0]
    rows, columns = processor.position_scheme.grid_shape(processed)
    values = (tokens.float() @ direction.float()).view(rows, columns).cpu().numpy()
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
    states, limited = iter(answer.states), media.resize(image)
    maps: list[SimilarityMap | None] = []
    for step in answer.trace:
        control_states = next(states) if step.state_norm is not None else None
        if control_states is None or bundle.model.forward_config.num_inner_forward_run == 1:
            maps.append(None)
        else:
            found = similarity_map(bundle.model, bundle.processor, step.kind, limited, control_states)
            maps.append(found.scaled(image.width / limited.width, image.height / limited.height))
    return maps
