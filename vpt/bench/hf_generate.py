"""The other side of figures about answering: transformers' own `generate` on the same model and prompts."""

import inspect

import torch

from vpt.bench.measure import Timed
from vpt.models.attention import SEGMENT_ATTENTION
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER, Batch


def generate(model: VPTModel, batch: Batch, new_tokens: int) -> Timed:
    """Greedy answers of `new_tokens` tokens.

    Args:
        model: whose language model and tower answer.
        batch: prompts of one length, each with an image.
        new_tokens: of each answer.
    """
    qwen, tower, images = model.qwen, model.tower, batch.images[VISION_TOWER]
    ids = batch.input_ids.view(len(batch.rows), -1)
    given = {
        "input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": images.pixels.to(qwen.dtype),
        "image_grid_thw": torch.tensor(images.grids, device=ids.device),
        "mm_token_type_ids": (ids == model.vocabulary.image_pad).int(),
    }  # fmt: skip
    known = inspect.signature(qwen.forward).parameters  # they differ between versions
    given = {name: value for name, value in given.items() if name in known}

    def run() -> None:
        [qwen.model.visual] = tower.transformers_tower
        qwen.set_attn_implementation("sdpa")
        qwen.generate(**given, do_sample=False, max_new_tokens=new_tokens, pad_token_id=0)
        qwen.set_attn_implementation(SEGMENT_ATTENTION)
        qwen.model.visual = tower

    return run
