"""What two inner passes cost: `python -m vpt.bench` (or `make bench`).

Every figure is a ratio measured in one run, its two sides in turn, the median of several rounds. The model has about
50 M parameters; a row has 64 image, 40 question, 256 DINO and 30 answer tokens. Prints a table and writes
`outputs/bench.json`: a list of {"name", "value", "bound", "better", "ok"}.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

from vpt.attention import SEGMENTS
from vpt.batch import IGNORE, TOWER, Action, Batch, Block, Looks, Row
from vpt.encoders.base import BuildContext, Look, View
from vpt.encoders.dino import DinoEncoder
from vpt.model import InnerPasses, VPTModel
from vpt.positions import GridSpan, row_positions
from vpt.tokens import ActionIds, PerceptionVocabulary

ROUNDS = 5
ROWS = 2
IMAGE, QUESTION, PERCEIVED, ANSWER = 64, 40, 256, 30
VOCABULARY = PerceptionVocabulary(1, 2, 3, 4, 5, 6, 0, actions={"dino": ActionIds(10, 11, 12, 13)})


class NoView(View):
    """Rows are made of tokens and random pixels; no image is prepared."""

    name = TOWER

    def prepare(self, image: object) -> Look:
        raise NotImplementedError


@dataclass(frozen=True)
class Figure:
    """One line of the table: `value` = cost of the first side / cost of the second."""

    name: str
    value: float
    bound: float
    better: str

    @property
    def ok(self) -> bool:
        """Whether the bound is kept."""
        return self.value <= self.bound if self.better == "lower" else self.value >= self.bound


def build_model() -> VPTModel:
    """About 50 M parameters, nearly all in the language model; the towers are small and frozen."""
    config = Qwen2VLConfig(
        vocab_size=8192, hidden_size=640, intermediate_size=1792, num_hidden_layers=10, num_attention_heads=10,
        num_key_value_heads=2, tie_word_embeddings=True, rope_scaling={"type": "mrope", "mrope_section": [8, 12, 12]},
        vision_config={"depth": 1, "embed_dim": 32, "num_heads": 2, "hidden_size": 640, "patch_size": 8},
        bos_token_id=0, eos_token_id=2, attn_implementation=SEGMENTS,
    )  # fmt: skip
    qwen = Qwen2VLForConditionalGeneration(config)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 128, "patch_size": 8}
    encoder = DinoEncoder.build(BuildContext("dino", 640, NoView()), config=sizes, weights=None, side=128)
    model = VPTModel(qwen, {"dino": encoder}, vocabulary=VOCABULARY, passes=InnerPasses())
    for tower in (qwen.model.visual, encoder.vision):
        tower.requires_grad_(False)
    return model


def build_batch(*, masked: bool = False) -> Batch:
    """Rows as in the published data: image and question, one re-encoding action, an answer."""
    question = [1, 7, 3, *[5] * IMAGE, 4, *range(100, 100 + QUESTION), 2]
    asked = [1, 8, 10]
    perceived = [11, 12, 2, 1, 7, 3, *[13] * PERCEIVED, 4, 2, 1, 8]
    answer = [*range(200, 200 + ANSWER), 2]
    ids = question + asked + perceived + answer
    control = len(question) + len(asked)
    side = int(IMAGE**0.5)
    row = Row(
        length=len(ids),
        blocks=(Block(3, IMAGE, TOWER, 0), Block(control + 6, PERCEIVED, "dino", 0)),
        actions=(Action(control, 1, "dino", 1),),
        masked=((1, len(question) - 1),) if masked else (),
    )
    rows = []
    for number in range(ROWS):
        blocks = tuple(replace(block, look=number) for block in row.blocks)
        rows.append(replace(row, start=number * len(ids), blocks=blocks))
    labels = [IGNORE] * (len(ids) - len(answer)) + answer
    patches, grid = IMAGE * 4, (1, 2 * side, 2 * side)
    return Batch(
        input_ids=torch.tensor(ids).repeat(ROWS),
        labels=torch.tensor(labels).repeat(ROWS),
        positions=row_positions(len(ids), [GridSpan(3, 1, side, side)]).repeat(1, ROWS),
        rows=rows,
        looks={
            TOWER: Looks(torch.randn(ROWS * patches, 3 * 2 * 8 * 8), [IMAGE] * ROWS, [grid] * ROWS),
            "dino": Looks(torch.randn(ROWS, 3, 128, 128), [PERCEIVED] * ROWS),
        },
    )


def step(model: VPTModel, batch: Batch, passes: InnerPasses) -> Callable[[], None]:
    """A training step, forward and backward, ready to be timed."""

    def run() -> None:
        model.passes = passes
        model.zero_grad(set_to_none=True)
        (model(batch).loss_sum / batch.label_count).backward()

    return run


def ratio(first: Callable[[], None], second: Callable[[], None]) -> float:
    """Median over rounds of time(first) / time(second), the two in turn."""
    first()
    second()
    ratios = []
    for _ in range(ROUNDS):
        times = []
        for side in (first, second):
            started = time.perf_counter()
            side()
            times.append(time.perf_counter() - started)
        ratios.append(times[0] / times[1])
    return statistics.median(ratios)


def measure() -> list[Figure]:
    """Every figure, with a progress bar."""
    torch.manual_seed(0)
    model, batch, masked = build_model(), build_batch(), build_batch(masked=True)
    plain = step(model, batch, InnerPasses(num_inner_forward_run=1))
    shared = step(model, batch, InnerPasses())
    sides = [
        ("shared_vs_plain", shared, plain, 1.05, "lower"),
        ("full_vs_shared", step(model, batch, InnerPasses("full")), shared, 1.9, "higher"),
        ("bottleneck_vs_plain", step(model, masked, InnerPasses(mask_mode="bottleneck")), plain, 1.05, "lower"),
        ("zero_vs_plain", step(model, masked, InnerPasses(mask_mode="zero")), plain, 1.7, "lower"),
    ]
    figures = []
    for name, first, second, bound, better in tqdm(sides, unit="figure", leave=False):
        figures.append(Figure(name, ratio(first, second), bound, better))
    return figures


def main() -> None:
    """Measure, print, write."""
    figures = measure()
    print(f"{'':24} measured  bound")
    for figure in figures:
        sign = "≤" if figure.better == "lower" else "≥"
        print(f"{figure.name:24} {figure.value:8.3f}  {sign} {figure.bound:<5} {'ok' if figure.ok else 'NOT KEPT'}")
    path = Path("outputs/bench.json")
    path.parent.mkdir(exist_ok=True)
    rows = [{"name": f.name, "value": f.value, "bound": f.bound, "better": f.better, "ok": f.ok} for f in figures]
    path.write_text(json.dumps(rows, indent=1))
    print(f"written to {path}; {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
