"""What clients are told: answers, pieces of them, the trace of perception and counts, in the OpenAI chat format."""

import base64
import io
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from vpt.generation.answer_images import answer_images
from vpt.generation.row_state import Answer, PerceptionStep
from vpt.generation.similarity_map import SimilarityMap
from vpt.generation.streaming import describe_step
from vpt.serving.rows import Prompt, ServedRow, TokenLogprobs


@dataclass
class ReplyWriter:
    """Writes the replies to one request."""

    model: str
    prompt: Prompt
    decode: Callable[[list[int]], str]
    id: str = field(default_factory=lambda: f"chatcmpl-{uuid.uuid4().hex}")
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(
        self, rows: Sequence[ServedRow], answers: Sequence[Answer], traces: Sequence[list[Any]]
    ) -> dict[str, Any]:
        """`chat.completion`."""
        choices = [
            {
                "index": number,
                "message": {"role": "assistant", "content": answer.text, "refusal": None} | self.extra(answer, trace),
                "finish_reason": finish_reason(answer),
                "logprobs": None if row.top_logprobs is None else {"content": self.logprobs(row.logprobs, row)},
            }
            for number, (row, answer, trace) in enumerate(zip(rows, answers, traces, strict=True))
        ]  # fmt: skip
        return self._envelope("chat.completion") | {"choices": choices, "usage": self.usage(answers)}

    def piece(
        self, index: int, delta: dict[str, Any], *, finish: str | None = None, logprobs: Any = None
    ) -> dict[str, Any]:
        """`chat.completion.chunk`."""
        choice = {"index": index, "delta": delta, "finish_reason": finish, "logprobs": logprobs}
        return self._envelope("chat.completion.chunk") | {"choices": [choice]}

    def counts(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """The last piece of a stream whose client asked for counts."""
        return self._envelope("chat.completion.chunk") | {"choices": [], "usage": self.usage(answers)}

    def _envelope(self, kind: str) -> dict[str, Any]:
        return {"id": self.id, "object": kind, "created": self.created, "model": self.model}

    def usage(self, answers: Sequence[Answer]) -> dict[str, Any]:
        """Tokens: of the prompt, those of images apart; said; and shown by perception, which count with neither."""
        prompt = len(self.prompt.sample.ids)
        visual = sum(block.length for block in self.prompt.sample.row.blocks)
        said = sum(len(answer.ids) for answer in answers)
        perceived = sum(step.visual_tokens for answer in answers for step in answer.trace)
        return {
            "prompt_tokens": prompt, "completion_tokens": said, "total_tokens": prompt + said,
            "prompt_tokens_details": {"text_tokens": prompt - visual, "image_tokens": visual},
            "completion_tokens_details": {"text_tokens": said, "perceived_tokens": perceived},
        }  # fmt: skip

    def extra(self, answer: Answer, trace: list[Any]) -> dict[str, Any]:
        """What OpenAI's format has no place for."""
        return {"vpt": {"answer": answer.text, "trace": trace, "confidence": answer.confidence}}

    def logprobs(self, found: Sequence[TokenLogprobs], row: ServedRow) -> list[dict[str, Any]]:
        """Log-probabilities of tokens; the token that ends the answer is left out."""
        ends = {row.generator.vocabulary.im_end, row.generator.vocabulary.end_of_text}
        return [
            self._logprob(one.token, one.logprob) | {"top_logprobs": [self._logprob(*pair) for pair in one.top]}
            for one in found
            if one.token not in ends
        ]

    def _logprob(self, token: int, logprob: float) -> dict[str, Any]:
        """A token that is a part of a character has no text, and no bytes of one are told."""
        text = self.decode([token])
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def finish_reason(answer: Answer) -> str:
    """`stop`, or `length` where a limit came first."""
    return "stop" if answer.complete else "length"


def trace_entry(step: PerceptionStep) -> dict[str, Any]:
    """A step of the trace: its fields, and one line about it."""
    return asdict(step) | {"note": describe_step(step)}


def step_pictures(
    image: Image.Image, trace: Sequence[PerceptionStep], found: SimilarityMap | None
) -> list[dict[str, str]]:
    """The image with all regions of a trace, and what its last step showed, as `Reply.draw` draws them.

    Args:
        image: at full resolution.
        trace: up to a step that was shown.
        found: f·c of that step.
    """
    images = answer_images(image, trace, [*[None] * (len(trace) - 1), found])
    return [{"caption": each.caption, "png": _png_url(each.image)} for each in (images[0], images[-1])]


def _png_url(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="png")
    return f"data:image/png;base64,{base64.b64encode(buffer.getvalue()).decode()}"
