"""Answers of a given length: tokens a second of our generation, and of transformers' `generate` on the same model."""

from dataclasses import replace
from pathlib import Path

import torch

from vpt.bench.gpu.published_sizes import BenchModel
from vpt.bench.hf_generate import generate
from vpt.bench.measure import Timed, time_in_turns
from vpt.bench.synthetic import SyntheticRow, synthetic_batch
from vpt.data.images import MediaStore
from vpt.data.processor import Processor, Sample
from vpt.data.records import Record
from vpt.data.transforms import ProcessedImage
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER, Batch, Row

ROUNDS = 3


class Decoding:
    """A model in half precision that answers prompts of an image and a question."""

    def __init__(self, model: VPTModel, sizes: BenchModel) -> None:
        self.model, self.sizes = model.eval(), sizes
        self.prompt = SyntheticRow(image=sizes.talk.image, question=sizes.talk.question, answer=0)
        with torch.no_grad():  # logits of zero: no answer ends before its time
            ends = [model.vocabulary.im_end, model.vocabulary.end_of_text]
            model.language.embed_tokens.weight[ends] = 0.0
            model.qwen.lm_head.weight[ends] = 0.0

    def rates(self, rows: int) -> tuple[float, float]:
        """Tokens a second, ours and theirs, the two in turn; the best of `ROUNDS` each."""
        batch = synthetic_batch(self.model, [self.prompt] * rows)
        sides = {"ours": self._ours(batch), "theirs": generate(self.model, batch, self.sizes.new_tokens)}
        taken = time_in_turns(sides, rounds=ROUNDS)
        tokens = rows * self.sizes.new_tokens
        return tokens / min(taken["ours"]), tokens / min(taken["theirs"])

    def _ours(self, batch: Batch) -> Timed:
        limits = GenerationLimits(max_new_tokens=self.sizes.new_tokens, action="none")
        generator = Generator(self.model, Processor(None, {}), lambda ids: "", limits)  # type: ignore[arg-type]
        samples = samples_of(batch)
        return lambda: generator.generate(samples, [MediaStore(Path())] * len(samples))


def samples_of(batch: Batch) -> list[Sample]:
    """The rows of a batch of equal prompts, one by one."""
    images = batch.images[VISION_TOWER]
    patches = [t * h * w for t, h, w in images.grids]
    looks = [
        ProcessedImage(*parts)
        for parts in zip(images.pixels.cpu().split(patches), images.tokens, images.grids, strict=True)
    ]
    samples = []
    for number, row in enumerate(batch.rows):
        own = slice(row.start, row.start + row.length)
        [block] = row.blocks
        alone = Row(row.length, (replace(block, image=0),))
        samples.append(
            Sample(
                batch.input_ids[own].cpu(), batch.labels[own].cpu(), batch.positions[:, own].cpu(), alone,
                {VISION_TOWER: [((VISION_TOWER, str(number)), looks[number])]}, {VISION_TOWER: VISION_TOWER},
                Record((), {}, str(number)),
            )
        )  # fmt: skip
    return samples
