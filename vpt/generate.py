"""Answering: the same walk as in training, with segments that come from the model.

Rows decode together, one feed a round. A row feeds the token it chose, or, once a turn with an action has ended, the
whole turn that it perceived; the others are unaffected. Greedy.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from vpt.batch import TOWER
from vpt.cache import RowCache
from vpt.data.images import ImageFolder
from vpt.data.packing import pack, stack
from vpt.data.records import Message
from vpt.data.samples import Sample, SampleEncoder
from vpt.data.template import Draft
from vpt.encoders.base import Look
from vpt.feeds import Feed, Sight, gather
from vpt.inner_forward import StageCache, extend
from vpt.intervention import Intervention
from vpt.model import VPTModel
from vpt.positions import row_positions
from vpt.regions import Region
from vpt.speaker import Answer, Limits, Speaker, Step


class Generator:
    """Answers prompts with a model that perceives while it answers."""

    def __init__(
        self, model: VPTModel, encoder: SampleEncoder, decode: Callable[[list[int]], str], limits: Limits, *,
        intervention: Intervention | None = None,
    ) -> None:  # fmt: skip
        """Args:
        model: in evaluation mode.
        encoder: the sample encoder that made the prompts.
        decode: token ids to text.
        limits: how far an answer may go.
        intervention: what is changed about perception; nothing by default.
        """
        self.model, self.encoder, self.decode, self.limits = model, encoder, decode, limits
        self.intervention = intervention or Intervention()
        self.vocabulary = model.vocabulary
        self._starts = {action.start: name for name, action in self.vocabulary.actions.items()}
        self._controls = {action.control: name for name, action in self.vocabulary.actions.items()}
        asking = [*self._starts, *([self.vocabulary.region_start] if self.vocabulary.region_start is not None else [])]
        self._asking = torch.tensor(asking, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], folders: Sequence[ImageFolder]) -> list[Answer]:
        """Answer every prompt (`SampleEncoder.prompt`); results in the order of the prompts."""
        self.intervention.before([sample.record for sample in samples])
        speakers = [
            Speaker(sample, folder, int(sample.positions[0, -1]) + 1)
            for sample, folder in zip(samples, folders, strict=True)
        ]
        cache = self._read(speakers)
        active = speakers
        while any(speaker.feed is not None for speaker in active):
            going = [i for i, speaker in enumerate(active) if speaker.feed is not None]
            if len(going) < len(active):
                cache.select(going)
                active = [active[i] for i in going]
            self._round(active, cache)
        return [self._finish(speaker) for speaker in speakers]

    def _read(self, speakers: list[Speaker]) -> RowCache:
        """Walk over the prompts as training does; each row chooses its first token."""
        batch = pack([speaker.sample for speaker in speakers]).to(self.model.device)
        tokens = self.model.project(self.model.look(batch.looks), batch)
        walk, stages = self.model.plan(batch), StageCache()
        hidden, _ = self.model.walk(batch, walk, tokens, stages)
        last = [row.start + row.length - 1 for row in batch.rows]
        self._speak(speakers, hidden[walk.final[last]])
        return RowCache(stages, walk.final, [row.length for row in batch.rows])

    def _round(self, active: list[Speaker], cache: RowCache) -> None:
        """Every row feeds, and decides what to feed next."""
        feeds = [speaker.feed for speaker in active if speaker.feed is not None]
        counts = [len(feed.ids) for feed in feeds]
        norm = self.model.language.norm.weight
        now = gather(feeds, cache.lengths, device=self.model.device, like=norm)
        embeddings = self.model.compose(now.ids, now.stage, self._perceive(now.sights), now.states)
        positions = torch.cat([self._positions(s, f) for s, f in zip(active, feeds, strict=True)], dim=1)
        cache.open_feed(counts)
        hidden = extend(self.model.language, cache, embeddings, positions.to(norm.device), now.stage.layout)
        cache.keep([count if feed.keep else 0 for count, feed in zip(counts, feeds, strict=True)])
        speaking: list[tuple[Speaker, Tensor]] = []
        for speaker, feed, part in zip(active, feeds, hidden.split(counts), strict=True):
            if speaker.asking is None:
                speaking.append((speaker, part[-1]))
            else:
                self._read_states(speaker, part[-1:] if feed.keep else part)
        if speaking:
            self._speak([speaker for speaker, _ in speaking], torch.stack([last for _, last in speaking]))

    def _perceive(self, sights: dict[str, list[Sight]]) -> dict[str, Tensor]:
        """Projected tokens of every source that some row looks through in this round."""
        tokens = {}
        for source, seen in sights.items():
            view = self.model.view_of(source)
            prepared = stack(view, [sight.look for sight in seen])
            prepared.pixels = prepared.pixels.to(self.model.device)
            features = self.model.look({view: prepared})[view]
            projected = features if source == TOWER else self.model.encoder(source).projector.project(features)
            parts = projected.split([sight.look.tokens for sight in seen])
            tokens[source] = torch.cat(
                [
                    self.intervention.tokens(part, source=source, record=sight.record)
                    for part, sight in zip(parts, seen, strict=True)
                ]
            )
        return tokens

    def _positions(self, speaker: Speaker, feed: Feed) -> Tensor:
        """[3, n]: they go on where the row is."""
        grid = self.encoder.numbering.grid_of(feed.sight.block, feed.sight.look) if feed.sight else None
        positions = row_positions(len(feed.ids), [grid] if grid else [], origin=speaker.position)
        if feed.keep:
            speaker.position = int(positions[0, -1]) + 1
        return positions

    def _speak(self, speakers: list[Speaker], hidden: Tensor) -> None:
        """Each row chooses its next token from its last hidden state, [n, D], and so its next feed."""
        logits = self.model.logits(hidden)
        spent = [i for i, s in enumerate(speakers) if len(s.trace) >= self.limits.max_actions]
        if spent and not self.limits.released:
            logits[torch.tensor(spent, device=logits.device)[:, None], self._asking] = -torch.inf
        for speaker, token in zip(speakers, self._choose(speakers, logits), strict=True):
            speaker.say(token)
            speaker.feed = self._after(speaker, token)
            self._check_length(speaker)

    def _choose(self, speakers: list[Speaker], logits: Tensor) -> list[int]:
        """One token for each row, from [n, vocabulary]."""
        return logits.argmax(dim=-1).tolist()

    def _after(self, speaker: Speaker, token: int) -> Feed | None:
        """What a row feeds once it has chosen `token`; None where its answer is complete."""
        if token in self._starts:
            speaker.asking, speaker.states = self._starts[token], []
        if token != self.vocabulary.im_end or self.limits.released:
            return Feed([token])
        turn = self._perceived_turn(speaker)
        if turn is None:
            speaker.complete = True
        else:
            speaker.said, speaker.states = [], []
        return turn

    def _check_length(self, speaker: Speaker) -> None:
        if len(speaker.ids) >= self.limits.max_new_tokens:
            speaker.feed = None

    def _read_states(self, speaker: Speaker, hidden: Tensor) -> None:
        """Take control states of the action that a row has begun, [n, D]; force its control tokens once all are there.

        As in training, the states after the first are read over plain control tokens whose keys are not kept.
        """
        assert speaker.asking is not None
        control = self.vocabulary.actions[speaker.asking].control
        scale = self.model.passes.projector_scale
        speaker.states.extend(hidden)
        if not self.limits.released and len(speaker.states) < scale:
            speaker.feed = Feed([control] * (scale - 1), keep=False)
            return
        states = torch.stack(speaker.states[-1:] if self.limits.released else speaker.states)
        states = self.intervention.states(states, kind=speaker.asking, record=speaker.sample.record)
        speaker.states[-len(states) :] = states
        speaker.feed = Feed([control] * len(states), states=states)
        speaker.say(*[control] * len(states))
        if len(speaker.states) == scale:
            speaker.asking = None
        self._check_length(speaker)

    def _perceived_turn(self, speaker: Speaker) -> Feed | None:
        """The user turn that shows what the turn just ended asked for; None where it asked for nothing.

        A turn that asks for several things gets the last re-encoding, else its first well-formed region.
        """
        acted = [self._controls[token] for token in speaker.said if token in self._controls]
        region = self._region(speaker.said)
        image = speaker.image() if acted or region else None
        if image is None:
            return None
        image = self.intervention.image(image, record=speaker.sample.record)
        if acted:
            states = torch.stack(speaker.states)
            look = self.encoder.prepare(acted[-1], speaker.folder.limit(image))
            speaker.trace.append(Step(acted[-1], state_norm=states.float().norm(dim=-1).mean().item()))
            return self._turn(speaker, acted[-1], look, states if self.model.passes.num_inner_forward_run > 1 else None)
        assert region is not None
        bins = len(self.vocabulary.x)
        region = self.intervention.region(region, image.size, bins=bins, record=speaker.sample.record)
        box = region.to_box(image.size, bins=bins, margin=self.limits.crop_margin)
        look = self.encoder.prepare(TOWER, speaker.folder.limit(image.crop(box)))
        speaker.trace.append(Step("region", box=box))
        return self._turn(speaker, TOWER, look, None)

    def _turn(self, speaker: Speaker, source: str, look: Look, steering: Tensor | None) -> Feed:
        """End the assistant's turn, show an image, and open the next one."""
        name = "image" if source == TOWER else f"{self.encoder.template.encoder_tokens[source]}_image"
        seen = look.tokens if self.intervention.perceives else 0
        speaker.trace[-1].visual_tokens = seen
        draft = Draft(ids=[self.vocabulary.im_end], labels=[0])
        self.encoder.template.write(draft, (Message("user", f"<{name}>"),), {source: [seen]})
        self.encoder.template.open_answer(draft)
        sight = Sight(draft.blocks[0], look, steering, speaker.sample.record) if seen else None
        return Feed(draft.ids, sight)

    def _region(self, said: list[int]) -> Region | None:
        """The first region that a turn names: start, x, y, x, y, end, corners in any order; anything else is none."""
        v = self.vocabulary
        x, y = {token: i for i, token in enumerate(v.x)}, {token: i for i, token in enumerate(v.y)}
        for start, a, b, c, d, end in zip(*(said[i:] for i in range(6)), strict=False):
            if start == v.region_start and end == v.region_end and a in x and b in y and c in x and d in y:
                return Region(min(x[a], x[c]), min(y[b], y[d]), max(x[a], x[c]), max(y[b], y[d]))
        return None

    def _finish(self, speaker: Speaker) -> Answer:
        said = [token for token in speaker.said if token != self.vocabulary.im_end]
        return Answer(self.decode(said).strip(), speaker.ids, speaker.trace, speaker.complete)
