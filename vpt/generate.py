"""Answering: the same walk as in training, with segments that come from the model.

Rows decode together, one feed a round. A row feeds the token it chose, or, once a turn with an action has ended, the
whole turn that it perceived; the others are unaffected. Greedy.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from PIL import Image
from torch import Tensor

from vpt.attention import Layout
from vpt.batch import TOWER, Block
from vpt.cache import RowCache
from vpt.data.images import ImageFolder
from vpt.data.packing import pack, stack
from vpt.data.records import Message
from vpt.data.samples import Sample, SampleEncoder
from vpt.data.template import Draft
from vpt.encoders.base import Look
from vpt.inner_forward import Perceived, Stage, StageCache, extend
from vpt.model import VPTModel
from vpt.positions import row_positions
from vpt.regions import Region
from vpt.tokens import ActionIds


@dataclass(frozen=True)
class Limits:
    """How far an answer may go.

    Attributes:
        max_new_tokens: tokens the model may say in all its turns, forced control tokens included.
        max_actions: perceptions a row may ask for; after them the tokens that ask are forbidden.
        crop_margin: cells by which a selected region is widened on each side.
        released: decode as the released code did, for comparison: past `<|im_end|>`, never perceiving, each control
            token's embedding the state just before it.
    """

    max_new_tokens: int = 64
    max_actions: int = 3
    crop_margin: int = 0
    released: bool = False


@dataclass
class Step:
    """One act of perception in an answer: its kind, the box for a region, the control states' norm for the others."""

    kind: str
    box: tuple[int, int, int, int] | None = None
    state_norm: float | None = None
    visual_tokens: int = 0


@dataclass
class Answer:
    """What a row said: the text of its last turn, all ids it produced, and how it perceived."""

    text: str
    ids: list[int]
    trace: list[Step]


@dataclass
class Feed:
    """What a row feeds next.

    Attributes:
        ids: tokens.
        block: placeholder tokens among them, what fills them, and the control states that steer it.
        states: [n, D] embeddings of the leading tokens, instead of their own.
        keep: False where only the hidden states are wanted (control states after the first).
    """

    ids: list[int]
    block: Block | None = None
    look: Look | None = None
    steering: Tensor | None = None
    states: Tensor | None = None
    keep: bool = True


@dataclass
class Speaker:
    """One row: what it has said, where it is, and what it does next."""

    index: int
    sample: Sample
    image: Callable[[], Image.Image] | None
    position: int
    feed: Feed | None = None
    said: list[int] = field(default_factory=list)  # this turn
    ids: list[int] = field(default_factory=list)  # all turns
    trace: list[Step] = field(default_factory=list)
    asking: str | None = None  # the re-encoder whose control states are being read
    states: list[Tensor] = field(default_factory=list)  # read for the action of this turn

    def take(self, token: int) -> None:
        self.said.append(token)
        self.ids.append(token)


class Generator:
    """Answers prompts with a model that perceives while it answers."""

    def __init__(
        self, model: VPTModel, encoder: SampleEncoder, decode: Callable[[list[int]], str], limits: Limits
    ) -> None:
        """Args:
        model: in evaluation mode.
        encoder: the sample encoder that made the prompts.
        decode: token ids to text.
        limits: how far an answer may go.
        """
        self.model, self.encoder, self.decode, self.limits = model, encoder, decode, limits
        self.vocabulary = model.vocabulary
        self._starts = {action.start: name for name, action in self.vocabulary.actions.items()}
        asking = [*self._starts, *([self.vocabulary.region_start] if self.vocabulary.region_start is not None else [])]
        self._asking = torch.tensor(asking, dtype=torch.long, device=model.device)

    @torch.no_grad()
    def answer(self, samples: Sequence[Sample], folders: Sequence[ImageFolder]) -> list[Answer]:
        """Answer every prompt (`SampleEncoder.prompt`); results in the order of the prompts."""
        speakers = [
            Speaker(i, sample, _first_image(sample, folder), int(sample.positions[0, -1]) + 1)
            for i, (sample, folder) in enumerate(zip(samples, folders, strict=True))
        ]
        batch = pack(samples).to(self.model.device)
        tokens = self.model.project(self.model.look(batch.looks), batch)
        walk, stages = self.model.plan(batch), StageCache()
        hidden, _ = self.model.walk(batch, walk, tokens, stages)
        hidden = hidden[walk.final]
        lengths = [row.length for row in batch.rows]
        cache = RowCache(stages, walk.final, lengths)
        last = hidden[[row.start + row.length - 1 for row in batch.rows]]
        self._speak(speakers, last)
        active = speakers
        while True:
            going = [i for i, speaker in enumerate(active) if speaker.feed is not None]
            if not going:
                break
            if len(going) < len(active):
                cache.select(going)
                active = [active[i] for i in going]
            self._round(active, cache)
        return [self._finish(speaker) for speaker in speakers]

    def _round(self, active: list[Speaker], cache: RowCache) -> None:
        """Every row feeds, and decides what to feed next."""
        feeds = [speaker.feed for speaker in active if speaker.feed is not None]
        counts = [len(feed.ids) for feed in feeds]
        stage, tokens, states = self._compose(feeds, counts, cache)
        ids = torch.tensor([token for feed in feeds for token in feed.ids], device=self.model.device)
        embeddings = self.model.compose(ids, stage, tokens, states)
        positions = torch.cat([self._positions(s, f) for s, f in zip(active, feeds, strict=True)], dim=1)
        cache.open_feed(counts)
        hidden = extend(self.model.language, cache, embeddings, positions.to(self.model.device), stage.layout)
        cache.keep([count if feed.keep else 0 for count, feed in zip(counts, feeds, strict=True)])
        parts = hidden.split(counts)
        speaking = []
        for speaker, feed, part in zip(active, feeds, parts, strict=True):
            if speaker.asking is not None:
                self._read_states(speaker, part if not feed.keep else part[-1:])
            else:
                speaking.append((speaker, part[-1]))
        if speaking:
            self._speak([speaker for speaker, _ in speaking], torch.stack([last for _, last in speaking]))

    def _compose(
        self, feeds: list[Feed], counts: list[int], cache: RowCache
    ) -> tuple[Stage, dict[str, Tensor], Tensor]:
        """The stage that all feeds make together, the tokens of what they perceive, and the states they bring."""
        device, none = self.model.device, torch.zeros(0, dtype=torch.long, device=self.model.device)
        layout = Layout.build(counts, [n + c for n, c in zip(cache.lengths, counts, strict=True)], device=device)
        stage = Stage(none, layout, none, none, [], none, none)
        width = self.model.language.config.hidden_size
        bank: list[Tensor] = [torch.zeros(0, width, device=device, dtype=self.model.language.norm.weight.dtype)]
        offset = banked = 0
        control_at: list[int] = []
        looks: dict[str, list[Look]] = {}
        tokens: dict[str, list[Tensor]] = {}
        for feed, count in zip(feeds, counts, strict=True):
            if feed.states is not None:
                control_at.extend(range(offset, offset + len(feed.states)))
                bank.append(feed.states)
                banked += len(feed.states)
            offset += count
        stage.control_at = torch.tensor(control_at, dtype=torch.long, device=device)
        stage.control_state = torch.arange(banked, device=device)
        offset = 0
        for feed, count in zip(feeds, counts, strict=True):
            if feed.block is not None and feed.look is not None:
                block, source = feed.block, feed.block.source
                states = None
                if feed.steering is not None:
                    states = torch.arange(banked, banked + len(feed.steering), device=device)[None]
                    bank.append(feed.steering)
                    banked += len(feed.steering)
                looks.setdefault(source, []).append(feed.look)
                first = sum(look.tokens for look in looks[source][:-1])
                stage.perceived.append(
                    Perceived(
                        source,
                        at=torch.arange(offset + block.start, offset + block.start + block.length, device=device),
                        tokens=torch.arange(first, first + block.length, device=device),
                        block=torch.zeros(block.length, dtype=torch.long, device=device),
                        states=states,
                    )
                )
            offset += count
        del tokens
        return stage, self._perceive(looks), torch.cat(bank)

    def _perceive(self, looks: dict[str, list[Look]]) -> dict[str, Tensor]:
        """Projected tokens of every source that some row looks through now."""
        tokens = {}
        for source, images in looks.items():
            view = self.model.view_of(source)
            prepared = stack(view, images)
            prepared.pixels = prepared.pixels.to(self.model.device)
            features = self.model.look({view: prepared})[view]
            tokens[source] = features if source == TOWER else self.model.encoders[source].projector.project(features)
        return tokens

    def _positions(self, speaker: Speaker, feed: Feed) -> Tensor:
        grids = []
        if feed.block is not None and feed.look is not None:
            grid = self.encoder.numbering.grid_of(feed.block, feed.look)
            grids = [grid] if grid is not None else []
        positions = row_positions(len(feed.ids), grids, origin=speaker.position)
        if feed.keep:
            speaker.position = int(positions[0, -1]) + 1
        return positions

    def _speak(self, speakers: list[Speaker], hidden: Tensor) -> None:
        """Each row chooses its next token from its last hidden state, [n, D], and so its next feed."""
        logits = self.model.logits(hidden)
        spent = [i for i, s in enumerate(speakers) if len(s.trace) >= self.limits.max_actions]
        if spent and not self.limits.released:
            logits[torch.tensor(spent, device=logits.device)[:, None], self._asking] = -torch.inf
        for speaker, token in zip(speakers, logits.argmax(dim=-1).tolist(), strict=True):
            speaker.feed = self._next(speaker, token)
            if len(speaker.ids) >= self.limits.max_new_tokens:
                speaker.feed = None

    def _next(self, speaker: Speaker, token: int) -> Feed | None:
        """What a row feeds once it has chosen `token`; None where its answer is complete."""
        speaker.take(token)
        if token in self._starts:
            speaker.asking, speaker.states = self._starts[token], []
            return Feed([token])
        if token == self.vocabulary.im_end and not self.limits.released:
            turn = self._perceived_turn(speaker)
            if turn is not None:
                speaker.said, speaker.states = [], []
            return turn
        return Feed([token])

    def _read_states(self, speaker: Speaker, hidden: Tensor) -> None:
        """Control states of the action that a row has begun: the first, then those read over plain control tokens."""
        assert speaker.asking is not None
        action: ActionIds = self.vocabulary.actions[speaker.asking]
        scale = self.model.passes.projector_scale
        speaker.states.extend(hidden)
        if self.limits.released:  # one after the other, each the embedding of its token
            speaker.feed = Feed([action.control], states=speaker.states[-1][None])
            speaker.take(action.control)
            if len(speaker.states) == scale:
                speaker.asking = None
        elif len(speaker.states) < scale:
            speaker.feed = Feed([action.control] * (scale - 1), keep=False)
        else:
            speaker.feed = Feed([action.control] * scale, states=torch.stack(speaker.states))
            for _ in range(scale):
                speaker.take(action.control)
            speaker.asking = None
        if len(speaker.ids) >= self.limits.max_new_tokens:
            speaker.feed = None

    def _perceived_turn(self, speaker: Speaker) -> Feed | None:
        """The user turn that shows what the turn just ended has asked for, or None where it asked for nothing."""
        if speaker.image is None:
            return None
        controls = {action.control: name for name, action in self.vocabulary.actions.items()}
        acted = [controls[token] for token in speaker.said if token in controls]
        if acted and self.model.passes.num_inner_forward_run > 1:
            return self._reencode(speaker, acted[-1])
        region = self._region(speaker.said)
        return self._zoom(speaker, region) if region is not None else None

    def _reencode(self, speaker: Speaker, source: str) -> Feed:
        assert speaker.image is not None
        states = torch.stack(speaker.states)
        look = self.encoder.prepare(source, speaker.image())
        speaker.trace.append(Step(source, state_norm=states.norm(dim=-1).mean().item(), visual_tokens=look.tokens))
        return self._turn(source, look, states)

    def _zoom(self, speaker: Speaker, region: Region) -> Feed:
        assert speaker.image is not None
        image = speaker.image()
        box = region.to_box(image.size, bins=len(self.vocabulary.x), margin=self.limits.crop_margin)
        look = self.encoder.prepare(TOWER, image.crop(box))
        speaker.trace.append(Step("region", box=box, visual_tokens=look.tokens))
        return self._turn(TOWER, look, None)

    def _turn(self, source: str, look: Look, steering: Tensor | None) -> Feed:
        name = "image" if source == TOWER else f"{self.encoder.template.encoder_tokens[source]}_image"
        draft = Draft(ids=[self.vocabulary.im_end], labels=[0])
        self.encoder.template.write(draft, (Message("user", f"<{name}>"),), {source: [look.tokens]})
        self.encoder.template.open_answer(draft)
        return Feed(draft.ids, draft.blocks[0], look, steering)

    def _region(self, said: list[int]) -> Region | None:
        """The region that a turn names: start, x, y, x, y, end, the corners in any order; else it is ignored."""
        v = self.vocabulary
        x, y = {t: i for i, t in enumerate(v.x)}, {t: i for i, t in enumerate(v.y)}
        for i in range(len(said) - 5):
            start, a, b, c, d, end = said[i : i + 6]
            if start == v.region_start and end == v.region_end and a in x and b in y and c in x and d in y:
                return Region(min(x[a], x[c]), min(y[b], y[d]), max(x[a], x[c]), max(y[b], y[d]))
        return None

    def _finish(self, speaker: Speaker) -> Answer:
        said = [token for token in speaker.said if token != self.vocabulary.im_end]
        return Answer(self.decode(said).strip(), speaker.ids, speaker.trace)


def _first_image(sample: Sample, folder: ImageFolder) -> Callable[[], Image.Image] | None:
    """Opens the image that actions refer to: the first of the conversation, at full resolution."""
    references = sample.record.images.get(TOWER)
    if not references:
        return None
    return lambda: folder.open(references[0], where=sample.record.where)
