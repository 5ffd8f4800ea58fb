"""What a control state looked for: f . c of every re-encoded token, over the part of the image that the view sees."""

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
    values: [rows, columns], f . c for each token of the encoder's grid: how far the token f points along the direction
        c that the control state gave, which is how much of c was added to it (`vpt.encoders.projectors`).
    extent: x0, y0, x1, y1 in pixels of the image that the grid covers; beyond the image where the view pads it.
    """

    values: np.ndarray
    extent: tuple[float, float, float, float]

    def scaled(self, across: float, down: float) -> "SimilarityMap":
        """The same over an image that is so many times as wide and as high."""
        x0, y0, x1, y1 = self.extent
        return SimilarityMap(self.values, (x0 * across, y0 * down, x1 * across, y1 * down))


@torch.no_grad()
def similarity_map(model: VPTModel, encoder: Processor, kind: str, image: Image.Image, states: Tensor) -> SimilarityMap:
    """Look at an image again as an action did.

    Args:
        model, encoder: as they answered.
        kind: the re-encoder.
        image: as it was looked at, limited in size.
        states: [s, D], the control states of the action.
    """
    view = encoder.transforms[kind]
    look = view(image)
    prepared = stack_images(view.name, [look])
    prepared.pixels = prepared.pixels.to(model.device)
    features = model.encode_images({model.transform_of(kind): prepared})[model.transform_of(kind)]
    projector = model.encoder(kind).projector
    tokens, direction = projector.project(features), projector.condition_vector(states[None].to(model.device))[0]
    rows, columns = encoder.position_scheme.grid_shape(look)
    values = (tokens.float() @ direction.float()).view(rows, columns).cpu().numpy()
    return SimilarityMap(values, view.coverage(image.size))


def similarity_maps(
    parts: ModelBundle, answer: Answer, folder: MediaStore, image: Image.Image
) -> list[SimilarityMap | None]:
    """For each step of an answer's trace what its control state looked for; None where none steered what was seen.

    Args:
        parts: what answered.
        answer: about `image`, given at full resolution.
        folder: limits the image in size, as when it was answered.
    """
    states, limited = iter(answer.states), folder.resize(image)
    maps: list[SimilarityMap | None] = []
    for step in answer.trace:
        steering = next(states) if step.state_norm is not None else None
        if steering is None or parts.model.forward_config.num_inner_forward_run == 1:
            maps.append(None)
        else:
            found = similarity_map(parts.model, parts.processor, step.kind, limited, steering)
            maps.append(found.scaled(image.width / limited.width, image.height / limited.height))
    return maps
