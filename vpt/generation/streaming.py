"""Printing an answer while it is generated."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import TextStreamer

from vpt.generation.row_state import IGNORED, REPAIRED, Answer, PerceptionStep, RowState


@dataclass
class AnswerStreamer:
    """Prints a row's text token by token: each turn on a line, each act of perception below the turn that began it."""

    tokenizer: Any
    printed: int = 0
    steps: int = 0
    streamer: Any = field(init=False)

    def __post_init__(self) -> None:
        self.streamer = TextStreamer(self.tokenizer, skip_special_tokens=True)

    def __call__(self, row: RowState) -> None:
        """Print new tokens. A step is printed with the first token that follows it: then its time is known."""
        if row.perceived_at is None and len(row.trace) > self.steps:
            self.streamer.end()
            self._print_steps(row.trace)
        for token in row.output_ids[self.printed :]:
            self.streamer.put(torch.tensor([token]))
        self.printed = len(row.output_ids)

    def end(self, answer: Answer) -> None:
        """Finish the last line; print the requests in it that were ignored, and whether it is empty or cut off."""
        self.streamer.end()
        self._print_steps(answer.trace)
        if not answer.text:
            print("  (no answer)")
        if not answer.complete:
            print("  (cut off: generation.max_new_tokens allows no more)")

    def _print_steps(self, trace: Sequence[PerceptionStep]) -> None:
        for step in trace[self.steps :]:
            print(f"  -> {describe_step(step)}", flush=True)
        self.steps = len(trace)


def describe_step(step: PerceptionStep) -> str:
    """One line about a step."""
    if step.status == IGNORED:
        return f"{step.kind}: ignored; it cannot be read, or its turn did not end, or was shown something else"
    shown = f"pixels {', '.join(map(str, step.box))}" if step.box else f"control state of norm {step.state_norm:.2f}"
    repaired = ", repaired" if step.status == REPAIRED else ""
    return f"{step.kind}{repaired}: {shown}, {step.visual_tokens} tokens, {step.seconds * 1000:.0f} ms"
