"""From a turn that asked for perception to the turn that shows it."""

import time
from collections.abc import Callable

import torch
from PIL import Image

from vpt.asking import FREE, REGION, Asking, Request
from vpt.batch import TOWER
from vpt.data.records import Message
from vpt.data.samples import SampleEncoder
from vpt.data.template import Draft
from vpt.encoders.base import Look
from vpt.feeds import Feed, Sight
from vpt.intervention import Intervention
from vpt.regions import Region
from vpt.speaker import IGNORED, MENDED, SEEN, Limits, Speaker, Step


class SecondLook:
    """Shows a row what it has asked for."""

    def __init__(
        self, encoder: SampleEncoder, asking: Asking, decode: Callable[[list[int]], str], limits: Limits,
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
        self.encoder, self.asking, self.decode, self.limits = encoder, asking, decode, limits
        self.intervention, self.steered = intervention, steered

    def turn(self, speaker: Speaker) -> Feed | None:
        """The user turn that shows what the turn just ended asked for; None where it shows nothing."""
        requests = self._requests(speaker)
        request = self.asking.shown(requests)
        if request is None or speaker.image is None or not self._granted(speaker):
            return None
        speaker.looked = time.perf_counter()
        record = speaker.sample.record
        own = speaker.folder.full(speaker.image, where=record.where)
        image = self.intervention.image(own, record=record)
        step = self._step(request, MENDED if request.mended else SEEN)
        if request.region is None:
            feed = self._reencoded(speaker, None if image is own else image, request, step)
        else:
            feed = self._region(speaker, image, request, step)
        speaker.trace.extend([*(self._step(other, IGNORED) for other in requests if other is not request), step])
        speaker.said, speaker.steering, speaker.has_asked = [], [], False
        speaker.log_probability = 0.0
        return feed

    def unseen(self, speaker: Speaker) -> list[Step]:
        """What a row asked for in a last turn that was shown nothing."""
        return [self._step(request, IGNORED) for request in self._requests(speaker)]

    def _requests(self, speaker: Speaker) -> list[Request]:
        """What a turn asked for; without region tokens, a turn that is nothing but a region in numbers asks for it."""
        bins, said = self.asking.vocabulary.text_bins, [t for t in speaker.said if t != self.asking.vocabulary.im_end]
        region = Region.from_numbers(self.decode(said), bins=bins) if bins else None
        if region is None:
            return self.asking.requests(speaker.said)
        return [Request(REGION, tuple(said), region, mended=self.decode(said) != region.to_numbers())]

    def _granted(self, speaker: Speaker) -> bool:
        """Whether a turn may be shown what it asked for: numbers cannot be forbidden before they are said."""
        if self.asking.requests(speaker.said):
            return True
        speaker.may_ask -= 1
        return speaker.may_ask >= 0 and self.limits.action == FREE

    def _step(self, request: Request, status: str) -> Step:
        return Step(request.kind, self.decode([*request.said]), status)

    def _region(self, speaker: Speaker, image: Image.Image, request: Request, step: Step) -> Feed:
        """The crop is cut out at full resolution and limited then."""
        assert request.region is not None
        bins = self.asking.vocabulary.bins
        region = self.intervention.region(request.region, image.size, bins=bins, record=speaker.sample.record)
        step.box = region.to_box(image.size, bins=bins, margin=self.limits.crop_margin)
        look = self.encoder.prepare(TOWER, speaker.folder.limit(image.crop(step.box)))
        return self._write(speaker, TOWER, look, step)

    def _reencoded(self, speaker: Speaker, other: Image.Image | None, request: Request, step: Step) -> Feed:
        """The row's own image may have been seen before, and what was seen kept; any other one is prepared."""
        assert speaker.image is not None
        states = torch.stack(speaker.steering)
        step.state_norm = states.float().norm(dim=-1).mean().item()
        speaker.states.append(states)
        if other is not None:
            look = self.encoder.prepare(request.kind, speaker.folder.limit(other))
        else:
            sources = {request.kind: (speaker.image,)}
            [(_, look)] = self.encoder.look(sources, speaker.folder, where=speaker.sample.record.where)[request.kind]
        return self._write(speaker, request.kind, look, step)

    def _write(self, speaker: Speaker, source: str, look: Look, step: Step) -> Feed:
        """End the assistant's turn, show an image, and open the next one."""
        step.visual_tokens = look.tokens if self.intervention.perceives else 0
        template = self.encoder.template
        name = "image" if source == TOWER else f"{template.encoder_tokens[source]}_image"
        draft = Draft(ids=[self.asking.vocabulary.im_end], labels=[0])
        template.write(draft, (Message("user", f"<{name}>"),), {source: [step.visual_tokens]})
        template.open_answer(draft)
        if not self.intervention.perceives:
            return Feed(draft.ids)
        steering = torch.stack(speaker.steering) if self.steered and source != TOWER else None
        return Feed(draft.ids, Sight(draft.blocks[0], look, steering, speaker.sample.record))
