"""Ablations of what is perceived."""

import torch
from PIL import Image
from torch import Tensor

from vpt.data.records import Record
from vpt.evaluation.ablations.base import Ablation, AblationContext, distinct_images, full_image, image_key
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.questions import EvalQuestion
from vpt.models.build import ModelBundle
from vpt.models.image_tokens import image_tokens
from vpt.perception.batch import VISION_TOWER

GREY = (128, 128, 128)


class FeaturesZeroed(Ablation):
    """Every perceived token is zero, those of crops, too. Conditioning adds nothing: (0 . c) c = 0."""

    description = "perceived features zeroed"

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        return torch.zeros_like(tokens)


class FeaturesNoise(Ablation):
    """Re-encoded features are normal noise, conditioned as the features would be.

    Each channel has the mean and deviation that it has over the first `images` images of the test split: moments of
    the question's own image would tell its colours.
    """

    description = "perceived features replaced by noise of the same moments"

    def __init__(self, context: AblationContext, *, seed: int = 0, images: int = 64) -> None:
        super().__init__(context, seed=seed)
        self.questions = list(distinct_images(context.asked).values())[:images]
        self._moments: dict[str, tuple[Tensor, Tensor]] = {}

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        if source not in self._moments:
            seen = self._features(source)
            self._moments[source] = seen.mean(dim=0), seen.std(dim=0)
        mean, deviation = self._moments[source]
        generator = torch.Generator().manual_seed(self.rng(record.where, source).getrandbits(62))
        noise = torch.randn(tokens.shape, generator=generator).to(mean)
        return (mean + noise * deviation).to(tokens.dtype)

    def _features(self, source: str) -> Tensor:
        """[T, D] unconditioned tokens of the reference images, image by image."""
        return torch.cat(
            [whole_image_tokens(self.context.bundle, question, source) for question in self.questions]
        ).float()


def whole_image_tokens(bundle: ModelBundle, question: EvalQuestion, source: str) -> Tensor:
    """[T, D] unconditioned tokens of a question's whole image through the tower or a re-encoder."""
    image = bundle.processor.apply_transform(source, question.folder.resize(full_image(question)))
    with bundle.model.autocast():
        return image_tokens(bundle.model, source, [image])


class FeaturesRepeated(Ablation):
    """Perceived tokens are those of the first look once more, over and over until they are as many: more tokens to
    attend to, with nothing new to see.
    """

    description = "perceived features replaced by those of the first look"

    def tokens(self, tokens: Tensor, *, source: str, record: Record) -> Tensor:
        first = whole_image_tokens(self.context.bundle, self.question_of[record.where], VISION_TOWER)
        return first.to(tokens)[torch.arange(len(tokens), device=tokens.device) % len(first)]


class FeaturesBlank(Ablation):
    """A grey image of the same size is encoded or cropped: as many tokens, of nothing."""

    description = "perceived features taken from a blank image"

    def image(self, image: Image.Image, *, record: Record) -> Image.Image:
        return Image.new(image.mode, image.size, GREY)


class FeaturesSwapped(Ablation):
    """Encode the image of another question instead; a region shows the same cells of it."""

    description = "perceived features taken from another image"

    def __init__(self, context: AblationContext, *, seed: int = 0) -> None:
        super().__init__(context, seed=seed)
        distinct = distinct_images(context.asked)
        places = {key: place for place, key in enumerate(distinct)}
        self.images = list(distinct.values())
        self._own = {q.record.where: places.get(image_key(q)) for q in context.asked}

    def applies_to(self, plain: Prediction) -> bool:
        return bool(plain.actions) and len(self.images) > 1

    def image(self, image: Image.Image, *, record: Record) -> Image.Image:
        own = self._own[record.where]
        assert own is not None, "what has no image does not perceive"
        other = self.images[(own + self.rng(record.where).randrange(1, len(self.images))) % len(self.images)]
        return full_image(other)


class MarkersOnly(Ablation):
    """The tokens that ask for perception are said, control states and all, and the turn that follows is empty."""

    description = "marker tokens alone, nothing perceived"
    perceives = False
