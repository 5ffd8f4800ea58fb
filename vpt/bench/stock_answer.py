"""Does transformers' own class answer as our model does? `python -m vpt.bench.stock_answer RUN FOLDER IMAGE`.

RUN has no re-encoders; FOLDER is its export with format=qwen, which transformers loads without a line of ours.
"""

import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForImageTextToText, AutoTokenizer

from vpt.data.collate import collate
from vpt.generation.pipeline import build_question, load, reply
from vpt.perception.batch import VISION_TOWER

TOKENS = 8


def our_answer(run: str, image: Path) -> tuple[str, dict[str, Any]]:
    """What our model says, and what it was given, as transformers takes it."""
    bundle = load(run, device="cpu")
    question = build_question(bundle.config, image, "what is it?", "")
    batch = collate([bundle.processor.encode_prompt(question.record, question.media)])
    ids, images = batch.input_ids[None], batch.images[VISION_TOWER]
    generation = replace(bundle.config.generation, max_new_tokens=TOKENS, action="none", temperature=0.0)
    return str(reply(bundle, question, generation)), {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images.pixels,
        "image_grid_thw": torch.tensor(images.grids),
        "mm_token_type_ids": (ids == bundle.model.vocabulary.image_pad).int(),
    }  # fmt: skip


def their_answer(folder: str, given: dict[str, Any]) -> str:
    """What transformers' class says of the same."""
    model, tokenizer = AutoModelForImageTextToText.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    said = model.generate(**given, do_sample=False, max_new_tokens=TOKENS)[0, given["input_ids"].shape[1] :]
    return str(tokenizer.decode(said, skip_special_tokens=True))


def main() -> None:
    """Print both; exit with 1 where they differ."""
    run, folder, image = sys.argv[1:]
    ours, given = our_answer(run, Path(image))
    theirs = their_answer(folder, given)
    print(f"ours: {ours!r}\ntransformers: {theirs!r}")
    sys.exit(ours.strip() != theirs.strip())


if __name__ == "__main__":
    main()
