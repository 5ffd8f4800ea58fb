"""A vision encoder that learns to see: every patch tells which digit, colour and shape it shows."""

from collections.abc import Sequence
from math import isqrt
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER
from vpt.pretraining.labels import CLASSES, OUTLINES, PLACES, UNKNOWN
from vpt.pretraining.views import View

TOWER = "tower"  # of the base model, among the parts that may learn
# of each head's loss
WEIGHTS = {"digit": 2.0, "colour": 0.5, "shape": 0.5, "column": 0.5, "row": 0.5, "gaps": 2.0}


class WordHead(nn.Module):
    """Classes are words of the language model: patches come to lie where its table of tokens has what they show."""

    def __init__(self, table: Tensor) -> None:
        """`table`: [classes, D] rows of the table of tokens, which stay as they are."""
        super().__init__()
        self.table = table
        self.log_scale, self.nothing = nn.Parameter(torch.ones(1)), nn.Parameter(torch.zeros(1))

    def forward(self, features: Tensor) -> Tensor:
        """[n, D] -> [n, classes + 1]; the last is nothing of the kind."""
        scores = features @ self.table.T * self.log_scale.exp()
        return torch.cat([scores, self.nothing.expand(len(scores), 1)], dim=1)


class PatchModel(nn.Module):
    """A part of a model, and a head for each thing that its patches tell."""

    def __init__(self, bundle: ModelBundle, part: str) -> None:
        """`part`: `TOWER`, or a re-encoder by its name."""
        super().__init__()
        model = bundle.model
        self.encoder: Any = model.tower if part == TOWER else model.encoder(part)
        self.vision: Any = model.tower if part == TOWER else self.encoder.vision
        self.transform = bundle.processor.transforms[VISION_TOWER if part == TOWER else part]
        if part == TOWER:
            told = CLASSES | PLACES
            self.heads = nn.ModuleDict({head: WordHead(word_rows(bundle, words)) for head, words in told.items()})
            return
        self.encoder.requires_grad_(False)
        self.vision.requires_grad_(True)
        for unused in self.encoder.unused_modules():
            unused.requires_grad_(False)
        width = self.encoder.projector.layernorm_feature.normalized_shape[0]
        told = CLASSES | OUTLINES
        self.heads = nn.ModuleDict({head: nn.Linear(width, len(words) + 1) for head, words in told.items()})

    def features(self, views: Sequence[View]) -> tuple[Tensor, list[int]]:
        """What the encoder makes of images: [positions, D], image after image, and how many lie along each's side."""
        images = [self.transform(view.image) for view in views]
        if self.encoder is self.vision:
            features = self.vision(torch.cat([image.pixels for image in images]), [image.grid for image in images])
            return features, [isqrt(image.tokens) for image in images]
        features = self.encoder.forward_features(torch.stack([image.pixels for image in images]))
        return features, [isqrt(len(features) // len(images))] * len(images)

    def forward(self, views: Sequence[View]) -> dict[str, tuple[Tensor, Tensor]]:
        """Head -> scores [n, classes] and labels [n], of the patches of which something is known."""
        features, sides = self.features(views)
        shown = [view.labels(side) for view, side in zip(views, sides, strict=True)]
        return {
            head: told for head, module in self.heads.items() if (told := _told(head, module, features, sides, shown))
        }

    def loss(self, views: Sequence[View]) -> Tensor:
        """The weighted sum of the heads' mean cross-entropies."""
        told = self(views).items()
        losses = [WEIGHTS[head] * F.cross_entropy(scores, labels) for head, (scores, labels) in told]
        return torch.stack(losses).sum()

    @torch.no_grad()
    def accuracy(self, views: Sequence[View]) -> dict[str, float]:
        """Head -> share of the patches that show something of its kind and tell what it is."""
        found = {}
        for head, (scores, labels) in self(views).items():
            something = labels < scores.shape[1] - 1
            if something.any():
                found[head] = (scores.argmax(dim=1) == labels)[something].float().mean().item()
        return found


def word_rows(bundle: ModelBundle, words: Sequence[str]) -> Tensor:
    """The rows of the table of tokens that words have as an answer, one token each. Raises KeyError for others."""
    vocabulary = bundle.tokenizer.get_vocab()
    return bundle.model.language.embed_tokens.weight.detach()[[vocabulary[word] for word in words]].clone()


def _told(
    head: str, module: nn.Module, features: Tensor, sides: Sequence[int], shown: Sequence[Any]
) -> tuple[Tensor, Tensor] | None:
    """Scores and labels of one head, over the images that have labels for it."""
    parts = features.split([side * side for side in sides])
    chosen = [number for number, labels in enumerate(shown) if head in labels]
    if not chosen:
        return None
    labels = torch.from_numpy(np.concatenate([shown[number][head].reshape(-1) for number in chosen]))
    scores = module(torch.cat([parts[number] for number in chosen]))
    return scores[labels != UNKNOWN], labels[labels != UNKNOWN]
