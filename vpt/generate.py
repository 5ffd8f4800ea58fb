"""Answering: the same walk as in training, with segments that come from the model.

Rows decode together, one feed a round. A row feeds the token it chose, or, once a turn with an action has ended, the
whole turn that it perceived; the others are unaffected.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vpt.asking import REGION, Asking
from vpt.batch import TOWER
from vpt.cache import RowCache
from vpt.config import GenerationConfig
from vpt.data.images import ImageFolder
from vpt.data.packing import pack, stack
from vpt.data.samples import Sample, SampleEncoder
from vpt.feeds import Feed, Sight, gather
from vpt.inner_forward import StageCache, extend
from vpt.intervention import Intervention
from vpt.model import VPTModel
from vpt.positions import row_positions
from vpt.sampling import Sampling
from vpt.second_look import SecondLook
from vpt.speaker import Answer, Limits, Speaker
from vpt.tokens import stop_ids


class Generator:
    """Answers prompts with a model that perceives while it answers."""

    def __init__(
        self, model: VPTModel, encoder: SampleEncoder, decode: Callable[[list[int]], str], limits: Limits,
        sampling: Sampling | None = None, *, intervention: Intervention | None = None,
    ) -> None:  # fmt: skip
        """Args:
        model: in evaluation mode.
        encoder: the sample encoder that made the prompts.
        decode: token ids to text.
        limits: what an answer may do, and how far it may go.
        sampling: how tokens are chosen; greedily by default.
        intervention: what is changed about perception; nothing by default.
        """
        self.model, self.encoder, self.decode, self.limits = model, encoder, decode, limits
        self.sampling, self.vocabulary = sampling or Sampling(), model.vocabulary
        self.intervention = intervention or Intervention()
        self.asking = Asking(model.vocabulary, limits.action, device=model.device)
        steered = model.passes.num_inner_forward_run > 1
        self.second_look = SecondLook(encoder, self.asking, decode, limits, self.intervention, steered=steered)
        self._stops = {self.vocabulary.end_of_text, *limits.stop}

    @classmethod
    def configured(
        cls, model: VPTModel, encoder: SampleEncoder, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig,
        *, intervention: Intervention | None = None,
    ) -> "Generator":  # fmt: skip
        """A generator as `settings` describe it. Raises ConfigError where a stop is not one token."""
        limits = Limits(
            settings.max_new_tokens, settings.max_actions, settings.crop_margin, settings.action,
            stop_ids(tokenizer, settings.stop),
        )  # fmt: skip
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        return cls(model.eval(), encoder, decode, limits, sampling, intervention=intervention)

    def answer(
        self, samples: Sequence[Sample], folders: Sequence[ImageFolder], *, numbers: Sequence[int] | None = None
    ) -> list[Answer]:
        """Answer every prompt (`SampleEncoder.prompt`); results in the order of the prompts.

        Args:
            samples, folders: the prompts, and where the image of each lies.
            numbers: of the rows, for what they draw; by default they are counted from 0.
        """
        speakers = self.open(samples, folders, numbers=numbers)
        for _ in self.rounds(speakers):
            pass
        return [self.finish(speaker) for speaker in speakers]

    def open(
        self, samples: Sequence[Sample], folders: Sequence[ImageFolder], *, numbers: Sequence[int] | None = None
    ) -> list[Speaker]:
        """Rows about to answer."""
        self.intervention.before([sample.record for sample in samples])
        numbers = range(len(samples)) if numbers is None else numbers
        speakers = [
            Speaker(sample, folder, self.sampling.dice(number), int(sample.positions[0, -1]) + 1)
            for sample, folder, number in zip(samples, folders, numbers, strict=True)
        ]
        for speaker in speakers:
            if speaker.image is not None:  # without one there is nothing to look at again
                speaker.may_ask, speaker.opening = self.limits.max_actions, self.asking.opening()
        return speakers

    def rounds(self, speakers: Sequence[Speaker]) -> Iterator[None]:
        """Let the rows answer; after each round every row that has not ended has said one more token, or an action's
        control tokens."""
        # Inference mode costs less, but weights that several processes share out would be gathered as its tensors.
        quiet = torch.no_grad if torch.distributed.is_initialized() else torch.inference_mode
        return quiet()(self._rounds)(speakers)

    def _rounds(self, speakers: Sequence[Speaker]) -> Iterator[None]:
        cache = self._read(speakers)
        active = list(speakers)
        yield
        while any(speaker.feed is not None for speaker in active):
            going = [i for i, speaker in enumerate(active) if speaker.feed is not None]
            if len(going) < len(active):
                cache.select(going)
                active = [active[i] for i in going]
            self._round(active, cache)
            yield

    def _read(self, speakers: Sequence[Speaker]) -> RowCache:
        """Walk over the prompts as training does; each row chooses its first token."""
        batch = pack([speaker.sample for speaker in speakers]).to(self.model.device)
        tokens = self.model.project(self.model.look(batch.looks), batch)
        last = np.array([row.start + row.length - 1 for row in batch.rows])
        walk, stages = self.model.plan(batch, last), StageCache()
        hidden, _ = self.model.walk(batch, walk, tokens, stages)
        self._speak(list(speakers), hidden[walk.hidden])
        return RowCache(stages, walk.cached, [row.length for row in batch.rows])

    def _round(self, active: list[Speaker], cache: RowCache) -> None:
        """Every row feeds, and decides what to feed next."""
        feeds = [speaker.feed for speaker in active if speaker.feed is not None]
        counts = [len(feed.ids) for feed in feeds]
        norm = self.model.language.norm.weight
        now = gather(feeds, cache.lengths, device=self.model.device, like=norm)
        embeddings = self.model.compose(now.ids, now.stage, self._perceive(now.sights), now.states)
        positions = torch.cat([self._positions(s, f) for s, f in zip(active, feeds, strict=True)], dim=1)
        cache.open_feed(counts)
        stage, language = now.stage, self.model.language
        hidden = extend(language, cache, embeddings, positions.to(norm.device), stage.layout, asked=stage.asked)
        cache.keep([count if feed.keep else 0 for count, feed in zip(counts, feeds, strict=True)])
        speaking: list[tuple[Speaker, Tensor]] = []
        for speaker, part in zip(active, hidden.split([feed.asked for feed in feeds]), strict=True):
            if speaker.asking is None:
                speaking.append((speaker, part[-1]))
            else:
                self._read_states(speaker, part)
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
        tokens = self._choose(speakers, logits)
        chosen = torch.tensor(tokens, device=logits.device)[:, None]
        believed = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
        for speaker, token, log_probability in zip(speakers, tokens, believed, strict=True):
            if speaker.looked is not None:
                speaker.trace[-1].seconds, speaker.looked = time.perf_counter() - speaker.looked, None
            speaker.say(token)
            speaker.log_probability += log_probability
            speaker.feed = self._after(speaker, token)
            self._check_length(speaker)

    def _choose(self, speakers: list[Speaker], logits: Tensor) -> list[int]:
        """One token for each row, from [n, vocabulary]; tokens that may not be said become -inf there."""
        if not self.limits.released:
            self.asking.restrict(logits, speakers)
        return self.sampling.choose(logits, [speaker.dice for speaker in speakers])

    def _after(self, speaker: Speaker, token: int) -> Feed | None:
        """What a row feeds once it has chosen `token`; None where its answer is complete."""
        speaker.has_asked |= self.asking.settles(token)
        if token in self.asking.starts:
            speaker.may_ask -= 1
            if self.asking.starts[token] != REGION:
                speaker.asking, speaker.steering = self.asking.starts[token], []
        if self.limits.released:
            return Feed([token])
        turn = None
        if token == self.vocabulary.im_end:
            turn = self.second_look.turn(speaker)
        elif token not in self._stops:
            return Feed([token])
        speaker.complete = turn is None
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
        speaker.steering.extend(hidden)
        if not self.limits.released and len(speaker.steering) < scale:
            speaker.feed = Feed([control] * (scale - 1), keep=False)
            return
        states = torch.stack(speaker.steering[-1:] if self.limits.released else speaker.steering)
        states = self.intervention.states(states, kind=speaker.asking, record=speaker.sample.record)
        speaker.steering[-len(states) :] = states
        carried = self.limits.released or self.model.passes.num_inner_forward_run > 1
        speaker.feed = Feed([control] * len(states), states=states if carried else None)
        speaker.say(*[control] * len(states))
        if len(speaker.steering) == scale:
            speaker.asking = None
        self._check_length(speaker)

    def finish(self, speaker: Speaker) -> Answer:
        """What a row has answered."""
        ends = {self.vocabulary.im_end, *self._stops}
        said = speaker.said[:-1] if speaker.said and speaker.said[-1] in ends else speaker.said
        trace = [*speaker.trace, *self.second_look.unseen(speaker)]
        confidence = math.exp(speaker.log_probability)
        return Answer(self.decode(said).strip(), speaker.ids, trace, speaker.complete, speaker.states, confidence)
