"""How a base model begins that is to learn to read: its attention looks for what is like the word it stands at.

From weights that are wholly random a small model takes hours to find that a question's word and an image's patch can
be compared; from these it takes minutes.
"""

import torch

from vpt.models.build import ModelBundle
from vpt.pretraining.labels import CLASSES

_SPACE = "Ġ"  # a leading space, as byte-level vocabularies spell it


@torch.no_grad()
def begin_alike(bundle: ModelBundle) -> None:
    """Let words begin as their spellings after a space, keys as queries, and outputs as their values' way back.

    Every key head must have a query head of its own.
    """
    vocabulary, table = bundle.tokenizer.get_vocab(), bundle.model.language.embed_tokens.weight
    for words in CLASSES.values():
        for word in words:
            if _SPACE + word in vocabulary:
                table[vocabulary[_SPACE + word]] = table[vocabulary[word]]
    for layer in bundle.model.language.layers:
        attention = layer.self_attn
        attention.k_proj.weight.copy_(attention.q_proj.weight)
        attention.o_proj.weight.copy_(attention.v_proj.weight.T)
