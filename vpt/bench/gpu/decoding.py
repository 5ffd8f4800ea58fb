"""Answers of a given length: tokens a second of our generation, and of transformers' `generate` on the same model."""

from dataclasses import replace
from pathlib import Path

import torch

from vpt.batch import TOWER, Batch, Row
from vpt.bench import theirs
from vpt.bench.figures import Side, seconds
from vpt.bench.gpu.sizes import Sizes
from vpt.bench.talks import Talk, batch_of
from vpt.data.images import ImageFolder
from vpt.data.records import Record
from vpt.data.samples import Sample, SampleEncoder
from vpt.encoders.base import Look
from vpt.generate import Generator
from vpt.model import VPTModel
from vpt.speaker import Limits

ROUNDS = 3


class Decoding:
    """A model in half precision that answers prompts of an image and a question."""

    def __init__(self, model: VPTModel, sizes: Sizes) -> None:
        self.model, self.sizes = model.eval(), sizes
        self.prompt = Talk(image=sizes.talk.image, question=sizes.talk.question, answer=0)
        with torch.no_grad():  # logits of zero: no answer ends before its time
            ends = [model.vocabulary.im_end, model.vocabulary.end_of_text]
            model.language.embed_tokens.weight[ends] = 0.0
            model.qwen.lm_head.weight[ends] = 0.0

    def rates(self, rows: int) -> tuple[float, float]:
        """Tokens a second, ours and theirs, the two in turn; the best of `ROUNDS` each."""
        batch = batch_of(self.model, [self.prompt] * rows)
        sides = {"ours": self._ours(batch), "theirs": theirs.generate(self.model, batch, self.sizes.new_tokens)}
        taken = seconds(sides, rounds=ROUNDS)
        tokens = rows * self.sizes.new_tokens
        return tokens / min(taken["ours"]), tokens / min(taken["theirs"])

    def _ours(self, batch: Batch) -> Side:
        limits = Limits(max_new_tokens=self.sizes.new_tokens, released=True)
        generator = Generator(self.model, SampleEncoder(None, {}), lambda ids: "", limits)  # type: ignore[arg-type]
        samples = samples_of(batch)
        return lambda: generator.answer(samples, [ImageFolder(Path())] * len(samples))


def samples_of(batch: Batch) -> list[Sample]:
    """The rows of a batch of equal prompts, one by one."""
    images = batch.looks[TOWER]
    patches = [t * h * w for t, h, w in images.grids]
    looks = [
        Look(*parts) for parts in zip(images.pixels.cpu().split(patches), images.tokens, images.grids, strict=True)
    ]
    samples = []
    for number, row in enumerate(batch.rows):
        own = slice(row.start, row.start + row.length)
        [block] = row.blocks
        alone = Row(row.length, (replace(block, look=0),))
        samples.append(
            Sample(
                batch.input_ids[own].cpu(), batch.labels[own].cpu(), batch.positions[:, own].cpu(), alone,
                {TOWER: [((TOWER, str(number)), looks[number])]}, {TOWER: TOWER}, Record((), {}, str(number)),
            )
        )  # fmt: skip
    return samples
