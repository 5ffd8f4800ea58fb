"""The user turn that shows a row all that its last turn requested."""

import time
from collections.abc import Callable, Sequence
from functools import partial

from PIL import Image
from torch import Tensor

from vpt.data.processor import Processor
from vpt.data.records import Message
from vpt.data.transforms import ProcessedImage, TokenRun
from vpt.generation.decode_step import RowInput, VisualInput
from vpt.generation.intervention import Intervention
from vpt.generation.row_state import DONE, IGNORED, REPAIRED, GenerationLimits, PerceptionStep, RowState
from vpt.perception.batch import VISION_TOWER, RowBuilder
from vpt.perception.regions import Region
from vpt.perception.requests import FREE, REGION, PerceptionParser, Request

# What a request is shown: source, processed image, the control states that condition it, its step in the trace
_Shown = tuple[str, ProcessedImage, Tensor | None, PerceptionStep]


class Perceiver:
    """Shows a row what it has requested."""

    def __init__(
        self, processor: Processor, parser: PerceptionParser, decode: Callable[[list[int]], str],
        limits: GenerationLimits, intervention: Intervention, *, conditioned: bool,
    ) -> None:  # fmt: skip
        """Args:
        processor: prepares images, writes turns.
        parser: reads what a turn requested.
        decode: token ids to text.
        limits: `crop_margin`.
        intervention: what is changed about perception.
        conditioned: whether control states condition re-encoded tokens (`num_inner_forward_run` 2).
        """
        self.processor, self.parser, self.decode, self.limits = processor, parser, decode, limits
        self.intervention, self.conditioned = intervention, conditioned

    def perceive(self, row: RowState) -> RowInput | None:
        """The user turn that shows what the turn just ended requested; None where it shows nothing."""
        requests = self.requests(row)
        if row.image is None or not requests:
            return None
        row.perceived_at = time.perf_counter()
        record = row.sample.record
        own = row.media.full_resolution(row.image, where=record.where)
        image = self.intervention.image(own, record=record)
        states, images = iter(row.turn_states), []
        for request, allowed in requests:
            row.trace.append(step := self._step(request, DONE if allowed else IGNORED))
            if request.kind != REGION:
                images.append(self._reencode(row, None if image is own else image, next(states), step))
            elif allowed and request.region is not None:
                images.append(self._region(row, image, request.region, step))
        row.turn_ids, row.turn_states, row.log_probability = [], [], 0.0
        return self._user_turn(row, images)

    def requests(self, row: RowState) -> list[tuple[Request, bool]]:
        """The requests of the turn just ended, and whether each is shown; none where nothing is. Once for a turn: those
        in text are counted.
        """
        requests = [(request, self._allowed(row, request)) for request in self.parser.parse(row.turn_ids)]
        return requests if row.image is not None and any(allowed for _, allowed in requests) else []

    def ignored(self, row: RowState) -> list[PerceptionStep]:
        """The requests of a last turn, which was shown nothing."""
        return [self._step(request, IGNORED) for request in self.parser.parse(row.turn_ids)]

    def _allowed(self, row: RowState, request: Request) -> bool:
        """Whether a request is shown: where it can be read. Text cannot be forbidden before it is there."""
        if request.text:
            row.actions_left -= 1
            return row.actions_left >= 0 and self.limits.action == FREE
        return request.readable

    def _step(self, request: Request, status: str) -> PerceptionStep:
        status = REPAIRED if status == DONE and request.repaired else status
        return PerceptionStep(request.kind, request.text or self.decode([*request.token_ids]), status)

    def _region(self, row: RowState, image: Image.Image, region: Region, step: PerceptionStep) -> _Shown:
        """A crop: cut out at full resolution, then limited in size."""
        bins = self.parser.vocabulary.bins
        region = self.intervention.region(region, image.size, bins=bins, record=row.sample.record)
        step.box = region.to_box(image.size, bins=bins, margin=self.limits.crop_margin)
        processed = self.processor.apply_transform(VISION_TOWER, row.media.resize(image.crop(step.box), crop=True))
        return VISION_TOWER, processed, None, step

    def _reencode(self, row: RowState, other: Image.Image | None, states: Tensor, step: PerceptionStep) -> _Shown:
        """The row's own image, whose features may be cached, or any `other` one, through a re-encoder."""
        assert row.image is not None
        step.state_norm = states.float().norm(dim=-1).mean().item()
        row.control_states.append(states)
        if other is not None:
            processed = self.processor.apply_transform(step.kind, row.media.resize(other))
        else:
            images = {step.kind: row.sample.record.images[VISION_TOWER][:1]}
            found = self.processor.process_images(images, row.media, where=row.sample.record.where)
            [(_, processed)] = found[step.kind]
        return step.kind, processed, states if self.conditioned else None, step

    def _user_turn(self, row: RowState, images: Sequence[_Shown]) -> RowInput:
        """End the assistant's turn, show images in order, and open the next one."""
        template = self.processor.chat_template
        runs: dict[str, list[list[TokenRun]]] = {}
        for source, processed, _, step in images:
            step.visual_tokens = processed.tokens if self.intervention.perceives else 0
            runs.setdefault(source, []).append([("", step.visual_tokens)])
        conversation = RowBuilder(ids=[self.parser.vocabulary.im_end], labels=[0])
        placeholders = (template.placeholder(source) for source, *_ in images)
        template.encode(conversation, (Message("user", "".join(placeholders)),), runs)
        template.add_generation_prompt(conversation)
        visuals = [
            VisualInput(
                span, processed, states, partial(self.intervention.tokens, source=source, record=row.sample.record)
            )
            for span, (source, processed, states, _) in zip(conversation.blocks, images, strict=True)
        ]
        return RowInput(conversation.ids, visuals if self.intervention.perceives else [])
