"""Answers of a given length: tokens a second of our generation, and of transformers' `generate` on the same model."""

import inspect
import time
from collections.abc import Callable
from pathlib import Path

import torch

from vpt.batch import TOWER, Batch
from vpt.bench.gpu.sizes import Sizes
from vpt.bench.gpu.training import wait
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
        ours, theirs = self._ours(batch), self._theirs(batch)
        taken = [(self._timed(ours), self._timed(theirs)) for _ in range(ROUNDS + 1)][1:]
        tokens = rows * self.sizes.new_tokens
        return tokens / min(pair[0] for pair in taken), tokens / min(pair[1] for pair in taken)

    def _ours(self, batch: Batch) -> Callable[[], object]:
        limits = Limits(max_new_tokens=self.sizes.new_tokens, released=True)
        generator = Generator(self.model, SampleEncoder(None, {}), lambda ids: "", limits)  # type: ignore[arg-type]
        samples = samples_of(batch)
        return lambda: generator.answer(samples, [ImageFolder(Path())] * len(samples))

    def _theirs(self, batch: Batch) -> Callable[[], object]:
        qwen, images, rows = self.model.qwen, batch.looks[TOWER], len(batch.rows)
        ids = batch.input_ids.view(rows, -1)
        given = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images.pixels.to(qwen.dtype),
            "image_grid_thw": torch.tensor(images.grids, device=ids.device),
            "mm_token_type_ids": (ids == self.model.vocabulary.image_pad).int(),
        }  # fmt: skip
        known = inspect.signature(qwen.forward).parameters
        given = {name: value for name, value in given.items() if name in known}
        implementation = qwen.config._attn_implementation

        def run() -> None:
            qwen.set_attn_implementation("sdpa")
            qwen.generate(**given, do_sample=False, max_new_tokens=self.sizes.new_tokens, pad_token_id=0)
            qwen.set_attn_implementation(implementation)

        return run

    def _timed(self, side: Callable[[], object]) -> float:
        wait(self.model.device)
        started = time.perf_counter()
        side()
        wait(self.model.device)
        return time.perf_counter() - started


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
        alone = type(row)(row.length, (type(block)(block.start, block.length, TOWER, 0),))
        samples.append(
            Sample(
                batch.input_ids[own].cpu(), batch.labels[own].cpu(), batch.positions[:, own].cpu(), alone,
                {TOWER: [((TOWER, str(number)), looks[number])]}, {TOWER: TOWER}, Record((), {}, str(number)),
            )
        )  # fmt: skip
    return samples
