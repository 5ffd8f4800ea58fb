"""Continuous batching: rows join and leave the running batch between decoding steps.

One thread runs the model. Of prompts it runs `prefill_tokens` at most in one step, beside the next tokens of
all who are answering. Rows may differ in all settings; those whose tokens are drawn alike draw together. A row's tokens
do not depend on the others. All that rows tell, they tell in that thread.
"""

import logging
import threading
from collections import OrderedDict, deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, replace
from itertools import groupby
from typing import Any

import torch
from torch import Tensor

from vpt.config.schema import GenerationConfig
from vpt.generation.generator import Generator, log_probabilities
from vpt.generation.intervention import Intervention
from vpt.generation.kv_cache import KVCache
from vpt.generation.running_batch import RunningBatch
from vpt.models.build import ModelBundle
from vpt.models.image_tokens import image_tokens
from vpt.perception.batch import VISION_TOWER
from vpt.serving.protocol import ApiError
from vpt.serving.rows import Prompt, ServedRow

LOG = logging.getLogger(__name__)
GENERATORS = 64  # kept for settings that come again


class Engine:
    """Runs the model for rows that `submit` brings; `deliver` is called when they have told what a step brought."""

    def __init__(self, bundle: ModelBundle, *, max_rows: int, max_queue: int, prefill_tokens: int) -> None:
        """`max_rows` answer together, `max_queue` more may wait; a step runs at most `prefill_tokens` of prompts."""
        self.bundle, self.model = bundle, bundle.model.eval()
        self.max_rows, self.max_queue, self.prefill_tokens = max_rows, max_queue, prefill_tokens
        self.deliver: Callable[[], None] = lambda: None
        self.draining = self.closed = False
        self.waiting: deque[ServedRow] = deque()
        self.reserved = 0  # rows of requests that are being read
        self._changed = threading.Condition()
        self._generators: OrderedDict[tuple[str, str], Generator] = OrderedDict()
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        with torch.inference_mode():
            self.batch = self._empty_batch()

    def start(self) -> None:
        """Start the thread that decodes."""
        self._thread.start()

    def reserve(self, rows: int) -> None:
        """Take places for rows to come. Raises ApiError where there are none, or the server is ending."""
        with self._changed:
            if self.draining:
                raise ApiError(503, "the server is ending; ask another one", kind="server_error", code="draining")
            taken = len(self.batch.rows) + len(self.waiting) + self.reserved
            if taken + rows > self.max_rows + self.max_queue:
                message = f"{taken} answers are being generated or wait; try again in a moment"
                raise ApiError(429, message, kind="rate_limit_error", code="queue_full")
            self.reserved += rows

    def release(self, rows: int) -> None:
        """Give back places that were reserved for rows which do not come."""
        with self._changed:
            self.reserved -= rows

    def submit(self, rows: Sequence[ServedRow]) -> None:
        """Let rows wait for their turn, in the places that were reserved for them. Raises ApiError while draining."""
        with self._changed:
            if self.draining:
                raise ApiError(503, "the server is ending; ask another one", kind="server_error", code="draining")
            self.reserved -= len(rows)
            self.waiting.extend(rows)
            self._changed.notify()

    def generator(self, settings: GenerationConfig, ablation: str, make: Callable[[], Intervention]) -> Generator:
        """The generator of some settings; seeds do not matter to it, rows have random numbers of their own."""
        settings = replace(settings, seed=0, batch_size=1)
        key = (repr(settings), ablation)
        with self._changed:
            found = self._generators.get(key)
        if found is None:
            parts = (self.bundle.model, self.bundle.processor, self.bundle.tokenizer)
            found = Generator.from_config(*parts, settings, intervention=make())
        with self._changed:
            self._generators[key] = found
            self._generators.move_to_end(key)
            if len(self._generators) > GENERATORS:
                self._generators.popitem(last=False)
        return found

    def drain(self) -> None:
        """Refuse what comes and what waits; finish what runs."""
        with self._changed:
            self.draining = True

    def abandon(self) -> None:
        """Let all rows go as they are."""
        for row in self._rows:
            row.deadline = 0.0

    def close(self) -> None:
        """Drain, and end the thread once all rows have ended."""
        self.drain()
        with self._changed:
            self.closed = True
            self._changed.notify()
        if self._thread.is_alive():
            self._thread.join(timeout=60)

    def _empty_batch(self) -> RunningBatch:
        language = self.model.language.config
        size = getattr(language, "head_dim", None) or language.hidden_size // language.num_attention_heads
        like = self.model.language.norm.weight
        cache = KVCache.empty(language.num_hidden_layers, language.num_key_value_heads, size, like=like)
        return RunningBatch(self.model, self.bundle.processor.position_scheme, [], cache)

    @property
    def _rows(self) -> list[ServedRow]:
        return self.batch.rows  # type: ignore[return-value]  # only such rows join

    @property
    def _candidates(self) -> list[ServedRow]:
        """Rows that wait, as many as there are places."""
        return [*self.waiting][: self.max_rows - len(self.batch.rows)]

    @torch.inference_mode()
    def _run(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self.waiting or self.batch.rows or self.closed)
                if self.closed and not self.batch.rows and not self.waiting:
                    return
            try:
                with self.model.autocast():
                    self._leave()
                    self.deliver()
                    self._admit()
                    if self.batch.rows:
                        self._step()
            except Exception:  # whatever it is: those who wait are answered, and the next ones served
                LOG.exception("a step failed")
                self._fail()
                self.deliver()

    def _fail(self) -> None:
        """Tell all rows that are running, and those about to join, whose prompt may be what failed; begin anew."""
        with self._changed:
            failed = [*self._rows, *self._candidates]
            self.waiting = deque([*self.waiting][len(self._candidates) :])
        for row in failed:
            row.listen("error", ApiError(500, "the answer could not be generated", kind="server_error"))
        self.batch = self._empty_batch()

    def _leave(self) -> None:
        """Let rows go that have ended, whose time is over, or to whom nobody listens."""
        gone = {row for row in self._rows if row.cancelled or row.late or row.next_input is None}
        if gone:
            for row in gone:
                if not row.cancelled:
                    row.listen("done", row.finish())
            self.batch.select(row not in gone for row in self._rows)
        with self._changed:
            left = {row: self.draining or row.late for row in self.waiting if not row.cancelled}
            self.waiting = deque(row for row, over in left.items() if not over)
        told, code = ("no place came free in time", "timeout")
        if self.draining:
            told, code = ("the server is ending", "draining")
        for row, over in left.items():
            if over:
                row.listen("error", ApiError(503, told, kind="server_error", code=code))

    def _admit(self) -> None:
        """Let waiting rows join, as far as there are places and their prompts fit into this step."""
        with self._changed:
            candidates = self._candidates
        self._encode_images(candidates)
        room = self.prefill_tokens - sum(len(row.next_input.ids) for row in self._rows if row.chunks and row.next_input)
        joining = []
        for row in candidates:
            size = min(len(row.prompt.sample.ids), self.prefill_tokens)
            if row.prompt.images_left or size > room:
                break
            room -= size
            row.next_input, *row.chunks = row.prompt.inputs(self.model, self.prefill_tokens)
            joining.append(row)
        if joining:
            with self._changed:
                for _ in joining:
                    self.waiting.popleft()
                self.batch.join(joining)

    def _encode_images(self, rows: Sequence[ServedRow]) -> None:
        """Encode images of prompts, in order, of at most `prefill_tokens` tokens together, or one."""
        prompts: dict[int, Prompt] = {id(row.prompt): row.prompt for row in rows}
        chosen: list[tuple[Prompt, Any]] = []
        room = self.prefill_tokens
        for prompt, image in [(one, image) for one in prompts.values() for image in one.images_left]:
            if chosen and image.tokens > room:
                break
            room -= image.tokens
            chosen.append((prompt, image))
        if not chosen:
            return
        features = image_tokens(self.model, VISION_TOWER, [image for _, image in chosen])
        for (prompt, _), own in zip(chosen, features.split([image.tokens for _, image in chosen]), strict=True):
            prompt.features.append(own)

    def _step(self) -> None:
        """One step of the batch; rows whose prompt has run choose their next token."""
        choosing: dict[ServedRow, Tensor] = {}
        for row, output in zip(self._rows, self.batch.step(), strict=True):
            if row.chunks:
                row.next_input = row.chunks.pop(0)
            elif row.pending_action is not None:
                row.generator.advance([row], [output])
            else:
                choosing[row] = output[-1]
        if choosing:
            self._choose(choosing)
        for row in self._rows:
            row.report()

    def _choose(self, states: dict[ServedRow, Tensor]) -> None:
        """Choose the next token of rows by their last hidden states, [D]; those of equal `Sampling` draw together."""
        rows = sorted(states, key=lambda row: (astuple(row.generator.sampling), id(row.generator)))
        logits = self.model.logits(torch.stack([states[row] for row in rows]))
        for generator, own in _runs(rows, lambda row: row.generator):
            generator.constraints.mask_logits(logits[own], rows[own])
        tokens: list[int] = []
        for sampling, own in _runs(rows, lambda row: row.generator.sampling):
            tokens += sampling.sample(logits[own], [row.rng for row in rows[own]])
        for row, *chosen in zip(rows, tokens, log_probabilities(logits, tokens), logits, strict=True):
            row.accept(*chosen)


def _runs(rows: Sequence[ServedRow], key: Callable[[ServedRow], Any]) -> Iterator[tuple[Any, slice]]:
    """Neighbours that have the same key, as slices."""
    start = 0
    for found, group in groupby(rows, key):
        stop = start + len([*group])
        yield found, slice(start, stop)
        start = stop
