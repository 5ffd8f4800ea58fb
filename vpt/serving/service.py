"""A trained model as a service: reads requests into rows for its engine."""

import asyncio
import secrets
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import takewhile
from pathlib import Path
from typing import Any

from vpt.config.schema import GenerationConfig
from vpt.config.validate import generation_settings, kinds_of
from vpt.data.image_cache import ImageCache
from vpt.data.processor import Processor
from vpt.errors import ConfigError, DataError
from vpt.evaluation.ablations.base import AblationContext
from vpt.evaluation.ablations.features import FeaturesZeroed
from vpt.evaluation.ablations.regions import RegionRandom
from vpt.generation.intervention import Intervention
from vpt.generation.pipeline import action_prompt_text
from vpt.generation.row_state import IGNORED, PerceptionStep
from vpt.generation.sampling import Sampling
from vpt.generation.similarity_map import step_map
from vpt.models.build import ModelBundle
from vpt.serving.conversation import PromptReader
from vpt.serving.engine import Engine
from vpt.serving.fetch import fetcher
from vpt.serving.protocol import ApiError, ChatRequest, parse_request
from vpt.serving.replies import ReplyWriter, step_pictures, trace_entry
from vpt.serving.rows import Prompt, ServedRow
from vpt.serving.settings import ServeConfig

ABLATIONS = {"features_zeroed": FeaturesZeroed, "region_random": RegionRandom}
IMAGE_CACHE_MB = 8  # an image is looked at again within its request, hardly ever beyond


@dataclass
class PendingRequest:
    """A request that is being answered: its rows, what they tell, (number of the row, kind, what), and the traces that
    have been told of.
    """

    rows: list[ServedRow]
    events: asyncio.Queue[tuple[int, str, Any]]
    writer: ReplyWriter
    since: float = field(default_factory=time.monotonic)
    begun: set[int] = field(default_factory=set)
    traces: defaultdict[int, list[Any]] = field(default_factory=lambda: defaultdict(list))

    def cancel(self) -> None:
        """Cancel the rows of the request."""
        for row in self.rows:
            row.cancelled = True


class Service:
    """Reads requests, and knows the model that answers them."""

    def __init__(self, bundle: ModelBundle, config: ServeConfig) -> None:
        self.bundle, self.config = bundle, config
        self.name = config.name or Path(config.checkpoint).name
        self.created = int(time.time())
        self.trained = replace(bundle.config, generation=generation_settings(bundle.config, config.generation))
        bundle.processor.max_length = config.max_prompt_tokens or bundle.processor.max_length
        bundle.processor.image_cache = ImageCache(IMAGE_CACHE_MB)
        self.processor: Processor = bundle.processor.with_feature_cache(None)  # of the threads that read prompts
        self.reader = PromptReader(
            bundle.config, PromptReader.special_tokens(bundle.tokenizer), config.max_images, config.max_pixels,
            fetcher(config),
        )  # fmt: skip
        self._settings = lru_cache(256)(self._checked_settings)  # checking takes milliseconds
        self.engine = Engine(
            bundle, max_rows=config.max_rows, max_queue=config.max_queue, prefill_tokens=config.prefill_tokens
        )
        self.engine.deliver = self._deliver
        self._told: dict[asyncio.AbstractEventLoop, list[tuple[asyncio.Queue[Any], Any]]] = {}

    def parse(self, body: bytes) -> ChatRequest:
        """A request within limits. Raises ApiError."""
        wanted = parse_request(body)
        if wanted.model:
            self.check_name(wanted.model)
        if (wanted.n or 1) > self.config.max_choices:
            raise ApiError(400, f"n={wanted.n}: at most {self.config.max_choices}", param="n")
        tokens = wanted.max_completion_tokens or wanted.max_tokens or 0
        if tokens > self.config.max_tokens:
            raise ApiError(400, f"max_tokens={tokens}: at most {self.config.max_tokens}", param="max_tokens")
        if wanted.top_logprobs is not None and not wanted.logprobs:
            raise ApiError(400, "top_logprobs needs logprobs=true", param="top_logprobs")
        return wanted

    def check_name(self, name: str) -> None:
        """Raises ApiError for another model."""
        if name != self.name:
            raise ApiError(404, f"model {name[:80]!r} is not here; {self.name} is", code="model_not_found")

    def _checked_settings(self, chosen: tuple[tuple[str, Any], ...]) -> GenerationConfig:
        """Those of a request; raises ConfigError."""
        settings = generation_settings(self.trained, dict(chosen))
        return replace(settings, max_new_tokens=min(settings.max_new_tokens, self.config.max_tokens))

    def read(self, wanted: ChatRequest, loop: asyncio.AbstractEventLoop) -> PendingRequest:
        """The rows of a request; they tell what they have to tell in `loop`. Raises ApiError."""
        try:
            settings = self._settings(tuple(wanted.settings().items()))
            sentence = action_prompt_text(self.trained, settings, action_prompt=wanted.action_prompt)
            record, media = self.reader.read(wanted.messages, sentence)
            turns = sum(message.role == "user" for message in record.messages)
            prompt = Prompt(self.processor.encode_prompt(record, media, turns=turns))
            generator = self.engine.generator(settings, wanted.ablation or "", partial(self._intervention, wanted))
        except ConfigError as error:
            raise ApiError(400, str(error)) from None
        except DataError as error:
            code = "context_length_exceeded" if "max_length" in str(error) else None
            raise ApiError(400, str(error), param="messages", code=code) from None
        drawn = settings.temperature > 0 and wanted.seed is None
        seed = secrets.randbits(32) if drawn else (settings.seed if wanted.seed is None else wanted.seed % 2**64)
        events: asyncio.Queue[tuple[int, str, Any]] = asyncio.Queue()
        count, deadline = wanted.n or 1, time.monotonic() + self.config.timeout
        started = generator.start([prompt.sample] * count, [media] * count)
        rows = []
        for number, state in enumerate(started):
            row = ServedRow.of(
                state, generator=generator, prompt=prompt, stops=wanted.stops, streams=bool(wanted.stream),
                top_logprobs=(wanted.top_logprobs or 0) if wanted.logprobs else None, deadline=deadline,
            )  # fmt: skip
            row.rng = Sampling(seed=seed).rng_for(number)
            row.listen = self._listener(row, number, events, loop, pictures=wanted.pictures)
            rows.append(row)
        decode: Callable[[list[int]], str] = self.bundle.tokenizer.decode
        return PendingRequest(rows, events, ReplyWriter(self.name, prompt, decode))

    def _listener(
        self, row: ServedRow, number: int, events: asyncio.Queue[Any], loop: asyncio.AbstractEventLoop, *,
        pictures: bool,
    ) -> Callable[[str, Any], None]:  # fmt: skip
        """Keeps what a row tells for its queue until the step is over; a step of its trace as clients read it, with
        what draws its pictures, if they are wanted."""

        def listen(kind: str, told: Any) -> None:
            if isinstance(told, PerceptionStep):
                told = trace_entry(told), self._draw(row, told) if pictures else None
            self._told.setdefault(loop, []).append((events, (number, kind, told)))

        return listen

    def _deliver(self) -> None:
        """Put what rows have told into their queues. Waking a loop for each piece would have the engine wait for it,
        since Python runs one thread at a time."""

        def put(pieces: list[tuple[asyncio.Queue[Any], Any]]) -> None:
            for events, piece in pieces:
                events.put_nowait(piece)

        while self._told:
            loop, pieces = self._told.popitem()
            with suppress(RuntimeError):  # the loop is closed: nobody listens
                loop.call_soon_threadsafe(put, pieces)

    def _draw(self, row: ServedRow, step: PerceptionStep) -> Callable[[], list[dict[str, str]]] | None:
        """Draws the pictures of a step that was shown. The model runs here and now, in the engine's thread."""
        if step.status == IGNORED or row.image is None:
            return None
        trace = [*takewhile(lambda other: other is not step, row.trace), step]
        encodings = sum(other.state_norm is not None for other in trace)
        states = row.control_states[encodings - 1] if step.state_norm is not None else None
        image = row.media.full_resolution(row.image, where=row.sample.record.where)
        return partial(step_pictures, image, trace, step_map(self.bundle, step, states, row.media, image))

    def _intervention(self, wanted: ChatRequest) -> Intervention:
        if wanted.ablation is None:
            return Intervention()
        return ABLATIONS[wanted.ablation](AblationContext(self.bundle, self.bundle.config, [], []))

    def model_card(self) -> dict[str, Any]:
        """The model, as `/v1/models` lists it."""
        return {"id": self.name, "object": "model", "created": self.created, "owned_by": "vpt"}

    def about(self) -> dict[str, Any]:
        """What the page needs to know."""
        settings: Any = self.trained.generation
        kinds = kinds_of(self.bundle.config)
        forced = [kind for kind in kinds if kind != "region" or self.bundle.config.model.region_format == "tokens"]
        return {"model": self.name, "actions": ["free", *forced], "max_actions": settings.max_actions,
                "crop_margin": settings.crop_margin, "max_tokens": settings.max_new_tokens,
                "temperature": settings.temperature, "max_images": self.config.max_images}  # fmt: skip
