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

from vpt.config.schema import GenerationConfig
from vpt.data.collate import collate, stack_images
from vpt.data.images import MediaStore
from vpt.data.processor import Processor, Sample
from vpt.generation.constraints import PerceptionConstraints
from vpt.generation.decode_step import RowInput, VisualInput, pack_inputs
from vpt.generation.intervention import Intervention
from vpt.generation.kv_cache import KVCache
from vpt.generation.perceiver import Perceiver
from vpt.generation.row_state import Answer, GenerationLimits, RowState
from vpt.generation.sampling import Sampling
from vpt.models.inner_forward import StagedKVCache, extend
from vpt.models.vpt import VPTModel
from vpt.perception.batch import VISION_TOWER
from vpt.perception.mrope import row_positions
from vpt.perception.requests import REGION, PerceptionParser
from vpt.perception.tokens import stop_ids


class Generator:
    """Answers prompts with a model that perceives while it answers."""

    def __init__(
        self, model: VPTModel, processor: Processor, decode: Callable[[list[int]], str], limits: GenerationLimits,
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
        self.model, self.processor, self.decode, self.limits = model, processor, decode, limits
        self.sampling, self.vocabulary = sampling or Sampling(), model.vocabulary
        self.intervention = intervention or Intervention()
        self.parser = PerceptionParser(model.vocabulary)
        self.constraints = PerceptionConstraints(self.parser, limits.action, device=model.device)
        steered = model.forward_config.num_inner_forward_run > 1
        self.perceiver = Perceiver(processor, self.parser, decode, limits, self.intervention, steered=steered)
        self._stops = {self.vocabulary.end_of_text, *limits.stop}

    @classmethod
    def from_config(
        cls, model: VPTModel, processor: Processor, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig,
        *, intervention: Intervention | None = None,
    ) -> "Generator":  # fmt: skip
        """A generator as `settings` describe it. Raises ConfigError where a stop is not one token."""
        limits = GenerationLimits(
            settings.max_new_tokens, settings.max_actions, settings.crop_margin, settings.action,
            stop_ids(tokenizer, settings.stop),
        )  # fmt: skip
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)

        def decode(ids: list[int]) -> str:
            return tokenizer.decode(ids, skip_special_tokens=True)

        return cls(model.eval(), processor, decode, limits, sampling, intervention=intervention)

    def generate(
        self, samples: Sequence[Sample], folders: Sequence[MediaStore], *, numbers: Sequence[int] | None = None
    ) -> list[Answer]:
        """Answer every prompt (`Processor.prompt`); results in the order of the prompts.

        Args:
            samples, folders: the prompts, and where the image of each lies.
            numbers: of the rows, for what they draw; by default they are counted from 0.
        """
        speakers = self.start(samples, folders, numbers=numbers)
        for _ in self.steps(speakers):
            pass
        return [self.finalize(speaker) for speaker in speakers]

    def start(
        self, samples: Sequence[Sample], folders: Sequence[MediaStore], *, numbers: Sequence[int] | None = None
    ) -> list[RowState]:
        """Rows about to answer."""
        self.intervention.on_batch([sample.record for sample in samples])
        numbers = range(len(samples)) if numbers is None else numbers
        speakers = [
            RowState(sample, folder, self.sampling.rng_for(number), int(sample.positions[0, -1]) + 1)
            for sample, folder, number in zip(samples, folders, numbers, strict=True)
        ]
        for speaker in speakers:
            if speaker.image is not None:  # without one there is nothing to look at again
                speaker.actions_left, speaker.forced_prefix = self.limits.max_actions, self.constraints.forced_prefix()
        return speakers

    def steps(self, speakers: Sequence[RowState]) -> Iterator[None]:
        """Let the rows answer; after each round every row that has not ended has said one more token, or an action's
        control tokens."""
        # Inference mode costs less, but weights that several processes share out would be gathered as its tensors.
        quiet = torch.no_grad if torch.distributed.is_initialized() else torch.inference_mode
        return quiet()(self._steps)(speakers)

    def _steps(self, speakers: Sequence[RowState]) -> Iterator[None]:
        cache = self._prefill(speakers)
        active = list(speakers)
        yield
        while any(speaker.next_input is not None for speaker in active):
            going = [i for i, speaker in enumerate(active) if speaker.next_input is not None]
            if len(going) < len(active):
                cache.select_rows(going)
                active = [active[i] for i in going]
            self._decode_step(active, cache)
            yield

    def _prefill(self, speakers: Sequence[RowState]) -> KVCache:
        """Walk over the prompts as training does; each row chooses its first token."""
        batch = collate([speaker.sample for speaker in speakers]).to(self.model.device)
        tokens = self.model.project_features(self.model.encode_images(batch.images), batch)
        last = np.array([row.start + row.length - 1 for row in batch.rows])
        walk, stages = self.model.plan_forward(batch, last), StagedKVCache()
        hidden, _ = self.model.run_stages(batch, walk, tokens, stages)
        self._sample_next(list(speakers), hidden[walk.output_index])
        return KVCache(stages, walk.kv_index, [row.length for row in batch.rows])

    def _decode_step(self, active: list[RowState], cache: KVCache) -> None:
        """Every row feeds, and decides what to feed next."""
        feeds = [speaker.next_input for speaker in active if speaker.next_input is not None]
        counts = [len(feed.ids) for feed in feeds]
        norm = self.model.language.norm.weight
        now = pack_inputs(feeds, cache.lengths, device=self.model.device, like=norm)
        embeddings = self.model.embed_inputs(now.ids, now.stage, self._encode_visual_inputs(now.visuals), now.states)
        positions = torch.cat([self._positions(s, f) for s, f in zip(active, feeds, strict=True)], dim=1)
        cache.reserve(counts)
        stage, language = now.stage, self.model.language
        hidden = extend(
            language, cache, embeddings, positions.to(norm.device), stage.layout, logits_to_keep=stage.logits_to_keep
        )
        cache.commit([count if feed.keep else 0 for count, feed in zip(counts, feeds, strict=True)])
        speaking: list[tuple[RowState, Tensor]] = []
        for speaker, part in zip(active, hidden.split([feed.num_outputs for feed in feeds]), strict=True):
            if speaker.pending_action is None:
                speaking.append((speaker, part[-1]))
            else:
                self._take_control_states(speaker, part)
        if speaking:
            self._sample_next([speaker for speaker, _ in speaking], torch.stack([last for _, last in speaking]))

    def _encode_visual_inputs(self, sights: dict[str, list[VisualInput]]) -> dict[str, Tensor]:
        """Projected tokens of every source that some row looks through in this round."""
        tokens = {}
        for source, seen in sights.items():
            view = self.model.transform_of(source)
            prepared = stack_images(view, [sight.image for sight in seen])
            prepared.pixels = prepared.pixels.to(self.model.device)
            features = self.model.encode_images({view: prepared})[view]
            projected = features if source == VISION_TOWER else self.model.encoder(source).projector.project(features)
            parts = projected.split([sight.image.tokens for sight in seen])
            tokens[source] = torch.cat(
                [
                    self.intervention.tokens(part, source=source, record=sight.record)
                    for part, sight in zip(parts, seen, strict=True)
                ]
            )
        return tokens

    def _positions(self, speaker: RowState, feed: RowInput) -> Tensor:
        """[3, n]: they go on where the row is."""
        grid = self.processor.position_scheme.grid_span(feed.visual.span, feed.visual.image) if feed.visual else None
        positions = row_positions(len(feed.ids), [grid] if grid else [], origin=speaker.position)
        if feed.keep:
            speaker.position = int(positions[0, -1]) + 1
        return positions

    def _sample_next(self, speakers: list[RowState], hidden: Tensor) -> None:
        """Each row chooses its next token from its last hidden state, [n, D], and so its next feed."""
        logits = self.model.logits(hidden)
        tokens = self._sample(speakers, logits)
        chosen = torch.tensor(tokens, device=logits.device)[:, None]
        believed = logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
        for speaker, token, log_probability in zip(speakers, tokens, believed, strict=True):
            if speaker.perceived_at is not None:
                speaker.trace[-1].seconds, speaker.perceived_at = time.perf_counter() - speaker.perceived_at, None
            speaker.append(token)
            speaker.log_probability += log_probability
            speaker.next_input = self._next_input(speaker, token)
            self._check_length(speaker)

    def _sample(self, speakers: list[RowState], logits: Tensor) -> list[int]:
        """One token for each row, from [n, vocabulary]; tokens that may not be said become -inf there."""
        if not self.limits.upstream:
            self.constraints.mask_logits(logits, speakers)
        return self.sampling.sample(logits, [speaker.rng for speaker in speakers])

    def _next_input(self, speaker: RowState, token: int) -> RowInput | None:
        """What a row feeds once it has chosen `token`; None where its answer is complete."""
        speaker.requested |= self.parser.completes(token)
        if token in self.parser.starts:
            speaker.actions_left -= 1
            if self.parser.starts[token] != REGION:
                speaker.pending_action, speaker.turn_states = self.parser.starts[token], []
        if self.limits.upstream:
            return RowInput([token])
        turn = None
        if token == self.vocabulary.im_end:
            turn = self.perceiver.perceive(speaker)
        elif token not in self._stops:
            return RowInput([token])
        speaker.complete = turn is None
        return turn

    def _check_length(self, speaker: RowState) -> None:
        if len(speaker.output_ids) >= self.limits.max_new_tokens:
            speaker.next_input = None

    def _take_control_states(self, speaker: RowState, hidden: Tensor) -> None:
        """Take control states of the action that a row has begun, [n, D]; force its control tokens once all are there.

        As in training, the states after the first are read over plain control tokens whose keys are not kept.
        """
        assert speaker.pending_action is not None
        control = self.vocabulary.actions[speaker.pending_action].control
        scale = self.model.forward_config.projector_scale
        speaker.turn_states.extend(hidden)
        if not self.limits.upstream and len(speaker.turn_states) < scale:
            speaker.next_input = RowInput([control] * (scale - 1), keep=False)
            return
        states = torch.stack(speaker.turn_states[-1:] if self.limits.upstream else speaker.turn_states)
        states = self.intervention.states(states, kind=speaker.pending_action, record=speaker.sample.record)
        speaker.turn_states[-len(states) :] = states
        carried = self.limits.upstream or self.model.forward_config.num_inner_forward_run > 1
        speaker.next_input = RowInput([control] * len(states), states=states if carried else None)
        speaker.append(*[control] * len(states))
        if len(speaker.turn_states) == scale:
            speaker.pending_action = None
        self._check_length(speaker)

    def finalize(self, speaker: RowState) -> Answer:
        """What a row has answered."""
        ends = {self.vocabulary.im_end, *self._stops}
        said = speaker.turn_ids[:-1] if speaker.turn_ids and speaker.turn_ids[-1] in ends else speaker.turn_ids
        trace = [*speaker.trace, *self.perceiver.ignored(speaker)]
        confidence = math.exp(speaker.log_probability)
        return Answer(
            self.decode(said).strip(), speaker.output_ids, trace, speaker.complete, speaker.control_states, confidence
        )
