"""The user turn that shows a row what its last turn requested."""

import time
from collections.abc import Callable
from functools import partial

import torch
from PIL import Image

from vpt.data.chat_template import EncodedConversation
from vpt.data.processor import Processor
from vpt.data.records import Message
from vpt.data.transforms import ProcessedImage
from vpt.generation.decode_step import RowInput, VisualInput
from vpt.generation.intervention import Intervention
from vpt.generation.row_state import DONE, IGNORED, REPAIRED, GenerationLimits, PerceptionStep, RowState
from vpt.perception.batch import VISION_TOWER
from vpt.perception.regions import Region
from vpt.perception.requests import FREE, REGION, PerceptionParser, Request


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
        requests = self._requests(row)
        request = self.parser.select(requests)
        if request is None or row.image is None or not self._allowed(row):
            return None
        row.perceived_at = time.perf_counter()
        record = row.sample.record
        own = row.media.full_resolution(row.image, where=record.where)
        image = self.intervention.image(own, record=record)
        step = self._step(request, REPAIRED if request.repaired else DONE)
        if request.region is None:
            shown = self._reencode(row, None if image is own else image, request, step)
        else:
            shown = self._region(row, image, request.region, step)
        row.trace.extend([*(self._step(other, IGNORED) for other in requests if other is not request), step])
        row.turn_ids, row.turn_states, row.requested = [], [], False
        row.log_probability = 0.0
        return shown

    def ignored(self, row: RowState) -> list[PerceptionStep]:
        """The requests of a last turn, which was shown nothing."""
        return [self._step(request, IGNORED) for request in self._requests(row)]

    def _requests(self, row: RowState) -> list[Request]:
        """The requests of a turn; without region tokens, a turn that is nothing but a region in numbers is one."""
        bins = self.parser.vocabulary.text_bins
        token_ids = [token for token in row.turn_ids if token != self.parser.vocabulary.im_end]
        region = Region.from_numbers(self.decode(token_ids), bins=bins) if bins else None
        if region is None:
            return self.parser.parse(row.turn_ids)
        repaired = self.decode(token_ids) != region.to_numbers()
        return [Request(REGION, tuple(token_ids), region, repaired=repaired)]

    def _allowed(self, row: RowState) -> bool:
        """Whether a turn may be shown what it requested: numbers cannot be forbidden before they are there."""
        if self.parser.parse(row.turn_ids):
            return True
        row.actions_left -= 1
        return row.actions_left >= 0 and self.limits.action == FREE

    def _step(self, request: Request, status: str) -> PerceptionStep:
        return PerceptionStep(request.kind, self.decode([*request.token_ids]), status)

    def _region(self, row: RowState, image: Image.Image, region: Region, step: PerceptionStep) -> RowInput:
        """Show a crop: cut out at full resolution, then limited in size."""
        bins = self.parser.vocabulary.bins
        region = self.intervention.region(region, image.size, bins=bins, record=row.sample.record)
        step.box = region.to_box(image.size, bins=bins, margin=self.limits.crop_margin)
        processed = self.processor.apply_transform(VISION_TOWER, row.media.resize(image.crop(step.box)))
        return self._user_turn(row, VISION_TOWER, processed, step)

    def _reencode(self, row: RowState, other: Image.Image | None, request: Request, step: PerceptionStep) -> RowInput:
        """Show the row's own image, whose features may be cached, or any `other` one, through a re-encoder."""
        assert row.image is not None
        states = torch.stack(row.turn_states)
        step.state_norm = states.float().norm(dim=-1).mean().item()
        row.control_states.append(states)
        if other is not None:
            processed = self.processor.apply_transform(request.kind, row.media.resize(other))
        else:
            images = {request.kind: (row.image,)}
            found = self.processor.process_images(images, row.media, where=row.sample.record.where)
            [(_, processed)] = found[request.kind]
        return self._user_turn(row, request.kind, processed, step)

    def _user_turn(self, row: RowState, source: str, processed: ProcessedImage, step: PerceptionStep) -> RowInput:
        """End the assistant's turn, show an image, and open the next one."""
        step.visual_tokens = processed.tokens if self.intervention.perceives else 0
        template = self.processor.chat_template
        name = "image" if source == VISION_TOWER else f"{template.encoder_tokens[source]}_image"
        conversation = EncodedConversation(ids=[self.parser.vocabulary.im_end], labels=[0])
        template.encode(conversation, (Message("user", f"<{name}>"),), {source: [step.visual_tokens]})
        template.add_generation_prompt(conversation)
        if not self.intervention.perceives:
            return RowInput(conversation.ids)
        states = torch.stack(row.turn_states) if self.conditioned and source != VISION_TOWER else None
        alter = partial(self.intervention.tokens, source=source, record=row.sample.record)
        return RowInput(conversation.ids, VisualInput(conversation.blocks[0], processed, states, alter))
