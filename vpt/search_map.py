"""What a control state looked for: f . c of every re-encoded token, over the part of the image that the view sees."""

from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vpt.build import Parts
from vpt.data.images import ImageFolder
from vpt.data.packing import stack
from vpt.data.samples import SampleEncoder
from vpt.model import VPTModel
from vpt.speaker import Answer


@dataclass(frozen=True)
class SearchMap:
    """Attributes:
    values: [rows, columns], f . c for each token of the encoder's grid: how far the token f points along the direction
        c that the control state gave, which is how much of c was added to it (`vpt.projector`).
    extent: x0, y0, x1, y1 in pixels of the image that the grid covers; beyond the image where the view pads it.
    """

    values: np.ndarray
    extent: tuple[float, float, float, float]

    def scaled(self, across: float, down: float) -> "SearchMap":
        """The same over an image that is so many times as wide and as high."""
        x0, y0, x1, y1 = self.extent
        return SearchMap(self.values, (x0 * across, y0 * down, x1 * across, y1 * down))


@torch.no_grad()
def search_map(model: VPTModel, encoder: SampleEncoder, kind: str, image: Image.Image, states: Tensor) -> SearchMap:
    """Look at an image again as an action did.

    Args:
        model, encoder: as they answered.
        kind: the re-encoder.
        image: as it was looked at, limited in size.
        states: [s, D], the control states of the action.
    """
    view = encoder.views[kind]
    look = view.prepare(image)
    prepared = stack(view.name, [look])
    prepared.pixels = prepared.pixels.to(model.device)
    features = model.look({model.view_of(kind): prepared})[model.view_of(kind)]
    projector = model.encoder(kind).projector
    tokens, direction = projector.project(features), projector.direction(states[None].to(model.device))[0]
    rows, columns = encoder.numbering.cells(look)
    values = (tokens.float() @ direction.float()).view(rows, columns).cpu().numpy()
    return SearchMap(values, view.seen(image.size))


def trace_maps(parts: Parts, answer: Answer, folder: ImageFolder, image: Image.Image) -> list[SearchMap | None]:
    """For each step of an answer's trace what its control state looked for; None where none steered what was seen.

    Args:
        parts: what answered.
        answer: about `image`, given at full resolution.
        folder: limits the image in size, as when it was answered.
    """
    states, limited = iter(answer.states), folder.limit(image)
    maps: list[SearchMap | None] = []
    for step in answer.trace:
        steering = next(states) if step.state_norm is not None else None
        if steering is None or parts.model.passes.num_inner_forward_run == 1:
            maps.append(None)
        else:
            found = search_map(parts.model, parts.encoder, step.kind, limited, steering)
            maps.append(found.scaled(image.width / limited.width, image.height / limited.height))
    return maps
