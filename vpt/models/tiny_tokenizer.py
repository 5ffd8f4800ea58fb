"""A tokenizer of Qwen's kind, small enough to train with on a laptop.

The real class with the real pre-tokenizer and byte fallback (any text can be encoded), its merges learned from a few
sentences, so that the words of the built-in tasks are single tokens.
"""

import json
from collections.abc import Sequence

from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import Qwen2Tokenizer

from vpt.data.records import REENCODE_PROMPT, REGION_PROMPT, SYSTEM_PROMPT
from vpt.data.sources.scene_layout import OUTERMOST, PLURALS
from vpt.data.sources.scene_rendering import COLOURS
from vpt.perception.tokens import CHAT_TOKENS

_COLOURS = ("black", "blue", "brown", "gray", "green", "red", "teal", "yellow")
_SHAPES = ("circle", "rectangle", "triangle", "shape")
_SENTENCES = [
    f"system\n{SYSTEM_PROMPT}",
    f"a {REGION_PROMPT} a {REENCODE_PROMPT}",
    *(f"user\nis there a {colour} {shape} in the image?" for colour in _COLOURS for shape in _SHAPES),
    *(f"what is the color of the {shape}? is no {colour} {shape} present?" for colour in _COLOURS for shape in _SHAPES),
    *(f"does the image not contain a {shape}? what shape is present?" for shape in _SHAPES),
    *(f"assistant\n{answer}" for answer in (*_COLOURS, *_SHAPES, "yes", "no", *"0123456789")),
    *(f"Which digit is in the {colour} frame? How many are larger than {n}?" for colour in _COLOURS for n in range(10)),
]  # fmt: skip
LESSONS = [  # the words of scenes and of lessons about them
    *(f"Where is the {colour} frame? Is there a {colour} frame? assistant\n{colour}" for colour in COLOURS),
    *(f"What colour is the {side} frame?" for side in OUTERMOST),
    "What colour is the frame around the 7? Which frames are there? Where are the frames?",
    "Is the digit left of the frame larger? right of above below",
    *(f"How many {digits}?" for digits in PLURALS),
]  # fmt: skip


def tiny_tokenizer(more: Sequence[str] = ()) -> Qwen2Tokenizer:
    """A Qwen2 tokenizer of a few hundred tokens, the same every time; it learns the words of `more` sentences, too."""
    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = Qwen2Tokenizer(vocab={"<|endoftext|>": 0}).backend_tokenizer.pre_tokenizer
    trainer = trainers.BpeTrainer(
        vocab_size=512, min_frequency=1, initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )  # fmt: skip
    learner.train_from_iterator([sentence for sentence in (*_SENTENCES, *more) for _ in range(2)], trainer)
    model = json.loads(learner.to_str())["model"]
    tokenizer = Qwen2Tokenizer(vocab=model["vocab"], merges=[tuple(pair) for pair in model["merges"]])
    tokenizer.add_tokens(list(CHAT_TOKENS), special_tokens=True)
    return tokenizer
