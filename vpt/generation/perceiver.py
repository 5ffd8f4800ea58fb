"""From a turn that asked for perception to the turn that shows it."""

import time
from collections.abc import Callable

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
    """Shows a row what it has asked for."""

    def __init__(
        self, processor: Processor, parser: PerceptionParser, decode: Callable[[list[int]], str], limits: GenerationLimits,
        intervention: Intervention, *, steered: bool,
    ) -> None:  # fmt: skip
        """Args:
        encoder: prepares images, writes turns.
        asking: reads what a turn asked for.
        decode: token ids to text.
        limits: `crop_margin`.
        intervention: what is changed about perception.
        steered: whether control states condition what is seen (`num_inner_forward_run` 2).
        """
        self.processor, self.parser, self.decode, self.limits = processor, parser, decode, limits
        self.intervention, self.steered = intervention, steered

    def perceive(self, speaker: RowState) -> RowInput | None:
        """The user turn that shows what the turn just ended asked for; None where it shows nothing."""
        requests = self._requests(speaker)
        request = self.parser.select(requests)
        if request is None or speaker.image is None or not self._allowed(speaker):
            return None
        speaker.perceived_at = time.perf_counter()
        record = speaker.sample.record
        own = speaker.media.full_resolution(speaker.image, where=record.where)
        image = self.intervention.image(own, record=record)
        step = self._step(request, REPAIRED if request.repaired else DONE)
        if request.region is None:
            feed = self._reencode(speaker, None if image is own else image, request, step)
        else:
            feed = self._region(speaker, image, request, step)
        speaker.trace.extend([*(self._step(other, IGNORED) for other in requests if other is not request), step])
        speaker.turn_ids, speaker.turn_states, speaker.requested = [], [], False
        speaker.log_probability = 0.0
        return feed

    def ignored(self, speaker: RowState) -> list[PerceptionStep]:
        """What a row asked for in a last turn that was shown nothing."""
        return [self._step(request, IGNORED) for request in self._requests(speaker)]

    def _requests(self, speaker: RowState) -> list[Request]:
        """What a turn asked for; without region tokens, a turn that is nothing but a region in numbers asks for it."""
        bins, said = (
            self.parser.vocabulary.text_bins,
            [t for t in speaker.turn_ids if t != self.parser.vocabulary.im_end],
        )
        region = Region.from_numbers(self.decode(said), bins=bins) if bins else None
        if region is None:
            return self.parser.parse(speaker.turn_ids)
        return [Request(REGION, tuple(said), region, repaired=self.decode(said) != region.to_numbers())]

    def _allowed(self, speaker: RowState) -> bool:
        """Whether a turn may be shown what it asked for: numbers cannot be forbidden before they are said."""
        if self.parser.parse(speaker.turn_ids):
            return True
        speaker.actions_left -= 1
        return speaker.actions_left >= 0 and self.limits.action == FREE

    def _step(self, request: Request, status: str) -> PerceptionStep:
        return PerceptionStep(request.kind, self.decode([*request.token_ids]), status)

    def _region(self, speaker: RowState, image: Image.Image, request: Request, step: PerceptionStep) -> RowInput:
        """The crop is cut out at full resolution and limited then."""
        assert request.region is not None
        bins = self.parser.vocabulary.bins
        region = self.intervention.region(request.region, image.size, bins=bins, record=speaker.sample.record)
        step.box = region.to_box(image.size, bins=bins, margin=self.limits.crop_margin)
        look = self.processor.apply_transform(VISION_TOWER, speaker.media.resize(image.crop(step.box)))
        return self._user_turn(speaker, VISION_TOWER, look, step)

    def _reencode(
        self, speaker: RowState, other: Image.Image | None, request: Request, step: PerceptionStep
    ) -> RowInput:
        """The row's own image may have been seen before, and what was seen kept; any other one is prepared."""
        assert speaker.image is not None
        states = torch.stack(speaker.turn_states)
        step.state_norm = states.float().norm(dim=-1).mean().item()
        speaker.control_states.append(states)
        if other is not None:
            look = self.processor.apply_transform(request.kind, speaker.media.resize(other))
        else:
            sources = {request.kind: (speaker.image,)}
            [(_, look)] = self.processor.process_images(sources, speaker.media, where=speaker.sample.record.where)[
                request.kind
            ]
        return self._user_turn(speaker, request.kind, look, step)

    def _user_turn(self, speaker: RowState, source: str, look: ProcessedImage, step: PerceptionStep) -> RowInput:
        """End the assistant's turn, show an image, and open the next one."""
        step.visual_tokens = look.tokens if self.intervention.perceives else 0
        template = self.processor.chat_template
        name = "image" if source == VISION_TOWER else f"{template.encoder_tokens[source]}_image"
        draft = EncodedConversation(ids=[self.parser.vocabulary.im_end], labels=[0])
        template.encode(draft, (Message("user", f"<{name}>"),), {source: [step.visual_tokens]})
        template.add_generation_prompt(draft)
        if not self.intervention.perceives:
            return RowInput(draft.ids)
        steering = torch.stack(speaker.turn_states) if self.steered and source != VISION_TOWER else None
        return RowInput(draft.ids, VisualInput(draft.blocks[0], look, steering, speaker.sample.record))
