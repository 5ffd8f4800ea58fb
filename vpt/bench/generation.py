"""Time of our generation over transformers' `generate`, and of one perception over a prefill."""

import inspect

import torch
from transformers import DynamicCache

from vpt.bench import measure as measuring
from vpt.bench.measure import Measurement, Ratio, Timed, ratio, timed, worst_of
from vpt.bench.models import ENCODER, SMALL, BenchModel
from vpt.data.collate import collate
from vpt.data.synthetic import MEDIA, SyntheticRow, synthetic_records
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.build import ModelBundle
from vpt.perception.batch import VISION_TOWER

BATCHES = (1, 8)


class Answering:
    """A model that answers prompts of an image and a question, `rows` of them at most."""

    def __init__(self, sizes: BenchModel, bundle: ModelBundle, rows: int) -> None:
        self.bundle, self.model, self.new_tokens = bundle, bundle.model.eval(), sizes.new_tokens
        prompt = SyntheticRow(sizes.row.image, sizes.row.question, answer=1)
        records = synthetic_records(bundle.processor, [prompt] * rows)
        self.prompts = [bundle.processor.encode_prompt(record, MEDIA) for record in records]
        ends = [self.model.vocabulary.im_end, self.model.vocabulary.end_of_text]
        with torch.no_grad():  # logits of zero: no answer ends before its time
            self.model.language.embed_tokens.weight[ends] = 0.0
            self.model.qwen.lm_head.weight[ends] = 0.0

    def generator(self, new_tokens: int, action: str) -> Generator:
        """Our generator; `action` is `generation.action`."""
        limits = GenerationLimits(new_tokens, action=action)
        return Generator(self.model, self.bundle.processor, self.bundle.tokenizer.decode, limits)

    def ours(self, rows: int) -> Timed:
        """Answers of `new_tokens` tokens without perception."""
        generator = self.generator(self.new_tokens, "none")
        return lambda: generator.generate(self.prompts[:rows], [MEDIA] * rows)

    def theirs(self, rows: int) -> Timed:
        """As many tokens by transformers' own `generate` of the same model."""
        qwen, tower, batch = self.model.qwen, self.model.tower, collate(self.prompts[:rows]).to(self.model.device)
        ids, images = batch.input_ids.view(rows, -1), batch.images[VISION_TOWER]
        given = {
            "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images.pixels.to(qwen.dtype),
            "image_grid_thw": torch.tensor(images.grids, device=ids.device),
            "mm_token_type_ids": (ids == self.model.vocabulary.image_pad).int(),
        }  # fmt: skip
        known = inspect.signature(qwen.forward).parameters  # they differ between versions
        given = {name: value for name, value in given.items() if name in known}

        def run() -> None:
            [qwen.model.visual] = tower.transformers_tower
            qwen.set_attn_implementation("sdpa")
            qwen.generate(**given, do_sample=False, max_new_tokens=self.new_tokens, pad_token_id=0)
            qwen.set_attn_implementation(SEGMENT_ATTENTION)
            qwen.model.visual = tower

        return run

    def perceiving(self) -> tuple[float, int]:
        """Seconds from the end of the turn that asks to the first token after what was seen; tokens fed for it."""
        generator = self.generator(8, ENCODER)
        [row] = generator.start(self.prompts[:1], [MEDIA])
        fed = 0
        for _ in generator.steps([row]):
            if row.next_input is not None and row.next_input.visuals:
                fed = len(row.next_input.ids)
        return row.trace[0].seconds, fed

    def prefill(self, tokens: int) -> Timed:
        """Prefill as many text tokens after the same prompt by transformers' forward, up to the next token's logits."""
        qwen, prompt = self.model.qwen, self.prompts[0].ids[None]
        cache = DynamicCache(config=qwen.config.get_text_config())

        @torch.no_grad()
        def feed(ids: torch.Tensor, *, keep: bool = False) -> None:
            qwen.set_attn_implementation("sdpa")
            start = cache.get_seq_length()
            positions = torch.arange(start, start + ids.shape[1]).expand(3, 1, -1)
            qwen(input_ids=ids, position_ids=positions, past_key_values=cache, use_cache=True, logits_to_keep=1)
            if not keep:
                cache.crop(-ids.shape[1])
            qwen.set_attn_implementation(SEGMENT_ATTENTION)

        feed(torch.full_like(prompt, 100), keep=True)
        more = torch.full((1, tokens), 100)
        return lambda: feed(more)


def measure() -> list[Measurement]:
    """Tokens a second of ours / theirs; one perception / prefilling as many tokens."""
    answering = Answering(SMALL, SMALL.build(), max(BATCHES))
    rates = {f"batch_{rows}": ratio(answering.theirs(rows), answering.ours(rows)) for rows in BATCHES}
    prefill = answering.prefill(answering.perceiving()[1])
    shares = [answering.perceiving()[0] / timed(prefill) for _ in range(measuring.ROUNDS)]
    return [
        *worst_of("decode_vs_transformers", rates, bound=1.0, better="higher"),
        Measurement("perceive_vs_prefill", Ratio.median(shares), 1.1),
    ]
