"""A row that answers a request: what its listener is told of its text, its perception and its end."""

import time
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor

from vpt.data.processor import Sample
from vpt.generation.decode_step import RowInput
from vpt.generation.generator import Generator
from vpt.generation.row_state import Answer, RowState
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER
from vpt.utils.text import until


@dataclass
class Prompt:
    """A prompt and the features of its images so far, one tensor for each; rows of one request share it."""

    sample: Sample
    features: list[Tensor] = field(default_factory=list)

    @property
    def images_left(self) -> list[Any]:
        """Processed images that are yet to be encoded."""
        return [image for _, image in self.sample.images.get(VISION_TOWER, [])[len(self.features) :]]

    def inputs(self, model: VPTModel, chunk: int) -> list[RowInput]:
        """The prompt in parts of at most `chunk` tokens, with the embeddings of its text and images."""
        ids = self.sample.ids.to(model.device)
        text = model.language.embed_tokens(ids)
        deep = max((one.shape[1] for one in self.features), default=text.shape[1]) - text.shape[1]
        embeddings = torch.cat([text, text.new_zeros(len(ids), deep)], dim=1)
        for block in self.sample.row.blocks:
            own = self.features[block.image][block.offset : block.offset + block.length]
            embeddings[block.start : block.start + block.length] = own.to(embeddings.dtype)
        stops = [*range(chunk, len(ids), chunk), len(ids)]
        return [
            RowInput(
                self.sample.ids[start:stop].tolist(), states=embeddings[start:stop],
                positions=self.sample.positions[:, start:stop],
            )
            for start, stop in zip([0, *stops], stops)
        ]  # fmt: skip


@dataclass
class TokenLogprobs:
    """A token, its log-probability, and the likeliest tokens with theirs."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


@dataclass(eq=False)
class ServedRow(RowState):
    """One answer of a request.

    Attributes:
        generator: its settings.
        prompt: what it answers.
        listen: called in the engine's thread with `text`, `step`, `done` or `error` and what there is to tell.
        stops: texts that end the answer.
        top_logprobs: how many alternatives of each token are told; None: no log-probabilities.
        streams: whether pieces of text are told; else the end is.
        deadline: when it is cut off, by time.monotonic.
        chunks: parts of the prompt that are yet to be run.
        cancelled: nobody listens any more; may be set by any thread.
        logprobs: of this turn's tokens.
    """

    generator: Generator = None  # type: ignore[assignment]
    prompt: Prompt = None  # type: ignore[assignment]
    listen: Callable[[str, Any], None] = lambda *_: None
    stops: tuple[str, ...] = ()
    top_logprobs: int | None = None
    streams: bool = False
    deadline: float = float("inf")
    chunks: list[RowInput] = field(default_factory=list)
    cancelled: bool = False
    logprobs: list[TokenLogprobs] = field(default_factory=list)
    stopped: bool = False
    _turn: int = 0  # tokens of this turn that have been read
    _sent: str = ""  # this turn's text as far as it has been told
    _shown: int = 0  # steps of the trace that have been told
    _told_logprobs: int = 0

    @classmethod
    def of(cls, state: RowState, **own: Any) -> "ServedRow":
        """A row that `Generator.start` has made, with what is told of it."""
        return cls(**{item.name: getattr(state, item.name) for item in fields(state) if item.init}, **own)

    def accept(self, token: int, log_probability: float, logits: Tensor) -> None:
        """Take the token that was chosen by these logits, [vocabulary]."""
        if self.top_logprobs is not None:
            values, numbers = logits.float().log_softmax(dim=-1).topk(min(self.top_logprobs, len(logits)))
            top = [pair for pair in zip(numbers.tolist(), values.tolist()) if pair[1] > -1e30]
            self.logprobs.append(TokenLogprobs(token, log_probability, top))
        self.generator.accept(self, token, log_probability)

    def report(self) -> None:
        """Tell what the last step brought: a step of perception, a piece of text."""
        if len(self.turn_ids) < self._turn:  # that turn asked for perception
            if self._sent:
                self.listen("text", ("\n", []))
            self._sent, self.logprobs, self._told_logprobs = "", [], 0
        self._turn = len(self.turn_ids)
        if self.perceived_at is None and len(self.trace) > self._shown:
            for step in self.trace[self._shown :]:
                self.listen("step", step)
            self._shown = len(self.trace)
        if self.next_input is not None and (self.streams or self.stops):
            self._read(self._visible())

    def finish(self) -> Answer:
        """The whole answer; tells what has not been told of it."""
        answer = self.generator.finalize(self)
        answer.text = until(answer.text, self.stops)
        answer.complete = answer.complete or self.stopped
        for step in answer.trace[self._shown :]:
            self.listen("step", step)
        if self.streams:
            self._tell(answer.text[len(self._sent) :] if answer.text.startswith(self._sent) else "", last=True)
        return answer

    def _visible(self) -> str:
        """This turn's text as far as nothing that may yet come can change it or make it a request."""
        generator = self.generator
        starts = [i for i, token in enumerate(self.turn_ids) if token in generator.parser.starts]
        text = generator.decode(self.turn_ids[: starts[0]] if starts else self.turn_ids).lstrip()
        if generator.vocabulary.text_bins and text.startswith("["):
            return ""  # perhaps a region in numbers
        return text.rstrip("\ufffd").rstrip()

    def _read(self, text: str) -> None:
        cut = until(text, self.stops)
        if len(cut) < len(text) and any(stop in text for stop in self.stops):
            self.stopped, self.next_input, text = True, None, cut
        held = max((held_back(text, stop) for stop in self.stops), default=0)
        text = text[: len(text) - held].rstrip()
        if self.streams and len(text) > len(self._sent):
            piece, self._sent = text[len(self._sent) :], text
            self._tell(piece)

    def _tell(self, piece: str, *, last: bool = False) -> None:
        new, self._told_logprobs = self.logprobs[self._told_logprobs :], len(self.logprobs)
        if piece or (last and new):
            self.listen("text", (piece, new))

    @property
    def late(self) -> bool:
        """Whether its deadline has passed."""
        return time.monotonic() > self.deadline


def held_back(text: str, stop: str) -> int:
    """Length of the longest end of a text that may be the beginning of a stop."""
    return next((size for size in range(min(len(stop) - 1, len(text)), 0, -1) if text.endswith(stop[:size])), 0)
