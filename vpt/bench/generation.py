"""Time of our generation over transformers' `generate`, and of one perception over a prefill."""

import statistics
import tempfile
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import DynamicCache

from vpt.bench.composed import composed
from vpt.bench.hf_generate import generate
from vpt.bench.measure import ROUNDS, Measurement, Timed, ratio, timed, worst_of
from vpt.checkpoint.load import build_model
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.records import parse_record
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.models.attention import SEGMENT_ATTENTION

NEW_TOKENS = 24
BATCHES = (1, 8)
SIZES = (  # as `vpt.bench.models`
    "model.config.vocab_size=8192", "model.config.hidden_size=640",
    "model.config.intermediate_size=1792", "model.config.num_hidden_layers=10", "model.config.num_attention_heads=10",
    "model.config.rope_scaling.mrope_section=[8,12,12]", "model.config.vision_config.hidden_size=640",
    "encoder.dino.sizes.tiny.options.side=224", "encoder.dino.sizes.tiny.config.image_size=224",
)  # fmt: skip


class Answering:
    """A model of 50 M parameters, and prompts of 64 image and 40 question tokens.

    Attributes:
        prompts: as many as the largest batch, each with an image of its own.
    """

    def __init__(self, folder: Path) -> None:
        torch.manual_seed(0)
        self.parts = build_model(composed("encoder=[dino]", *SIZES))
        self.model = self.parts.model.eval()
        self.folder = MediaStore(folder)
        self.prompts = [self._prompt(f"{number}.png") for number in range(max(BATCHES))]
        vocabulary = self.model.vocabulary
        with torch.no_grad():  # logits of zero: no answer ends before its time
            self.model.language.embed_tokens.weight[[vocabulary.im_end, vocabulary.end_of_text]] = 0.0

    def _prompt(self, name: str) -> Any:
        Image.effect_noise((128, 128), 60).convert("RGB").save(self.folder.root / name)
        question = {"role": "user", "content": "<image>\n" + "what is the red shape in the image? " * 4}
        raw = {"messages": [question, {"role": "assistant", "content": "yes"}], "images": [name]}
        record = parse_record(raw, where=name, encoder_tokens={"dino": "detection"})
        return self.parts.processor.encode_prompt(record, self.folder)

    def generator(self, limits: GenerationLimits) -> Generator:
        """Ours."""
        return Generator(self.model, self.parts.processor, self.parts.tokenizer.decode, limits)

    def ours(self, rows: int) -> Timed:
        """Answers of `NEW_TOKENS` tokens without perception."""
        generator = self.generator(GenerationLimits(NEW_TOKENS, action="none"))
        return lambda: generator.generate(self.prompts[:rows], [self.folder] * rows)

    def theirs(self, rows: int) -> Timed:
        """Generate the same number of tokens by transformers' `generate`."""
        return generate(self.model, collate(self.prompts[:rows]), NEW_TOKENS)

    def perceiving(self) -> tuple[float, int]:
        """Seconds from the end of the turn that asks to the first token after what was seen; tokens fed for it."""
        generator = self.generator(GenerationLimits(8, action="dino"))
        [row] = generator.start(self.prompts[:1], [self.folder])
        fed = 0
        for _ in generator.steps([row]):
            if row.next_input is not None and row.next_input.visual is not None:
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
    with tempfile.TemporaryDirectory() as folder:
        answering = Answering(Path(folder))
        rates = {f"batch_{rows}": ratio(answering.theirs(rows), answering.ours(rows)) for rows in BATCHES}
        prefill = answering.prefill(answering.perceiving()[1])
        shares = [answering.perceiving()[0] / timed(prefill) for _ in range(ROUNDS)]
    return [
        *worst_of("decode_vs_transformers", rates, bound=1.0, better="higher"),
        Measurement("perceive_vs_prefill", statistics.median(shares), 1.1),
    ]
