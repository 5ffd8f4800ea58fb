"""Records as Visual-CoT writes them, and where its real files are."""

from typing import Any

import pytest

from conftest import SHARED
from vpt.data.visual_cot.records import BOX_PROMPT
from vpt.perception.regions import Box

VISCOT = SHARED / "viscot"
METADATA = ("sroie_cot_train.jsonl", "vsr_cot_train.jsonl")
real = pytest.mark.skipif(not VISCOT.is_dir(), reason=f"no real files in {VISCOT}")


def metadata(**changes: Any) -> dict[str, Any]:
    record = {
        "question": "What is left?", "answer": "A cat", "image": "a.jpg", "width": 80, "height": 160,
        "bboxs": [[12.5, 25, 31, 59.5]], "dataset": "vsr", "split": "train",
    }  # fmt: skip
    return {key: value for key, value in (record | changes).items() if value is not None}


def benchmark(box: Box, size: tuple[int, int], *, padded: bool = True) -> dict[str, Any]:
    """A record as the benchmark writes it: a box in pixels twice, in an image that is not named."""
    sides = (max(size), max(size)) if padded else size
    fractions = [round((v + (sides[i % 2] - size[i % 2]) // 2) / sides[i % 2], 3) for i, v in enumerate(box)]
    values = [f"<image>\nWhat is left? {BOX_PROMPT}", str(fractions), "<image>", "A cat"]
    return {
        "dataset": "vsr", "question_id": 7, "image": ["cot/a.jpg", f"cot/a.jpg###{[int(v) for v in box]}"],
        "conversations": [{"from": ("human", "gpt")[i % 2], "value": value} for i, value in enumerate(values)],
    }  # fmt: skip
