"""Answering: stages of `extend` as in training, with segments that come from the model.

Rows decode together, one `RowInput` a step: the token that a row chose or, once a turn with an action has ended, the
whole user turn that shows what it perceived. The others are unaffected.
"""

import math
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Self

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from vpt.config.schema import GenerationConfig
from vpt.data.chat_template import THINK
from vpt.data.collate import collate
from vpt.data.images import MediaStore
from vpt.data.processor import Processor, Sample
from vpt.generation.constraints import PerceptionConstraints
from vpt.generation.decode_step import RowInput
from vpt.generation.intervention import Intervention
from vpt.generation.kv_cache import KVCache
from vpt.generation.perceiver import Perceiver
from vpt.generation.row_state import IGNORED, Answer, Draw, GenerationLimits, RowState
from vpt.generation.running_batch import RunningBatch
from vpt.generation.sampling import Sampling
from vpt.models.inner_forward import StagedKVCache
from vpt.models.vpt import VPTModel
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
        processor: what made the prompts.
        decode: token ids to text.
        limits: on perception and length.
        sampling: how tokens are chosen; greedily by default.
        intervention: what is changed about perception; nothing by default.
        """
        self.model, self.processor, self.decode, self.limits = model, processor, decode, limits
        self.sampling, self.vocabulary = sampling or Sampling(), model.vocabulary
        self.intervention = intervention or Intervention()
        self.parser = PerceptionParser(model.vocabulary, decode)
        self.constraints = PerceptionConstraints(self.parser, limits.action, device=model.device)
        self.conditioned = model.forward_config.num_inner_forward_run > 1
        self.perceiver = Perceiver(
            processor, self.parser, decode, limits, self.intervention, conditioned=self.conditioned
        )
        self._stops = {self.vocabulary.end_of_text, *limits.stop}

    @classmethod
    def from_config(
        cls, model: VPTModel, processor: Processor, tokenizer: PreTrainedTokenizerBase, settings: GenerationConfig,
        *, intervention: Intervention | None = None,
    ) -> Self:  # fmt: skip
        """A generator as `settings` describe it. Raises ConfigError where a stop is not one token."""
        limits = GenerationLimits(
            settings.max_new_tokens, settings.max_actions, settings.crop_margin, settings.action,
            stop_ids(tokenizer, settings.stop),
        )  # fmt: skip
        sampling = Sampling(settings.temperature, settings.top_k, settings.top_p, settings.seed)

        def decode(ids: list[int]) -> str:
            text: str = tokenizer.decode(ids, skip_special_tokens=True)
            return text.rpartition(THINK[1])[2] if processor.chat_template.thinking else text

        return cls(model.eval(), processor, decode, limits, sampling, intervention=intervention)

    def generate(
        self, samples: Sequence[Sample], media: Sequence[MediaStore], *, numbers: Sequence[int] | None = None
    ) -> list[Answer]:
        """Answer every prompt (`Processor.encode_prompt`); results in the order of the prompts.

        Args:
            samples, media: the prompts, and where the image of each lies.
            numbers: of the rows, for their random numbers; by default they are counted from 0.
        """
        rows = self.start(samples, media, numbers=numbers)
        for _ in self.steps(rows):
            pass
        return [self.finalize(row) for row in rows]

    def start(
        self, samples: Sequence[Sample], media: Sequence[MediaStore], *, numbers: Sequence[int] | None = None,
        recording: bool = False,
    ) -> list[RowState]:  # fmt: skip
        """Rows about to answer; `recording` keeps their inputs and draws."""
        self.intervention.on_batch([sample.record for sample in samples])
        numbers = range(len(samples)) if numbers is None else numbers
        rows = [
            RowState(
                sample, store, self.sampling.rng_for(number), int(sample.positions[0, -1]) + 1, recording=recording
            )
            for sample, store, number in zip(samples, media, numbers, strict=True)
        ]
        for row in rows:
            if row.image is not None and self.intervention.may_request:  # without one there is nothing to perceive
                row.actions_left, row.forced_prefix = self.limits.max_actions, self.constraints.forced_prefix()
                if row.forced_prefix:
                    row.forced_prefix[:0] = [(token,) for token in self.processor.chat_template.no_thought()]
        return rows

    def steps(self, rows: Sequence[RowState]) -> Iterator[None]:
        """Let the rows answer; yields after each step, in which every row that has not ended has got one more token,
        or an action's control tokens."""
        # Inference mode costs less, but weights that several processes share out would be gathered as its tensors.
        no_grad = torch.no_grad if torch.distributed.is_initialized() else torch.inference_mode
        return no_grad()(self._steps)(rows)

    def _steps(self, rows: Sequence[RowState]) -> Iterator[None]:
        with self.model.autocast():
            cache = self._prefill(rows)
        batch = RunningBatch(self.model, self.processor.position_scheme, rows, cache)
        yield
        while batch.select(row.next_input is not None for row in batch.rows):
            with self.model.autocast():
                self.advance(batch.rows, batch.step())
            yield

    def _prefill(self, rows: Sequence[RowState]) -> KVCache:
        """Run the prompts as training does, each once for all its rows, and choose the first token of each row."""
        prompts = {id(row.sample): row.sample for row in rows}
        places = {key: place for place, key in enumerate(prompts)}
        batch = collate([*prompts.values()]).to(self.model.device)
        tokens = self.model.project_features(self.model.encode_images(batch.images), batch)
        last = np.array([packed.start + packed.length - 1 for packed in batch.rows])
        plan, stages = self.model.plan_forward(batch, last), StagedKVCache()
        hidden, _ = self.model.run_stages(batch, plan, tokens, stages)
        cache = KVCache(stages, plan.kv_index, [packed.length for packed in batch.rows])
        order = [places[id(row.sample)] for row in rows]
        if len(places) < len(rows):
            cache.select_rows(order)
        self._sample_next(list(rows), self.model.logits(hidden[plan.output_index][order]))
        return cache

    def advance(self, rows: Sequence[RowState], outputs: Sequence[Tensor]) -> None:
        """Choose the next input of each row; `outputs` are the hidden states that its last one gave, [n, D]."""
        sampling = [row for row in rows if row.pending_action is None]
        last = [output[-1] for row, output in zip(rows, outputs, strict=True) if row.pending_action is None]
        for row, output in zip(rows, outputs, strict=True):
            if row.pending_action is not None:
                self._take_control_states(row, output)
        if sampling:
            self._sample_next(sampling, self.model.logits(torch.stack(last)))

    def _sample_next(self, rows: list[RowState], logits: Tensor) -> None:
        """Choose each row's next token from [n, vocabulary], and so its next input."""
        tokens = self._sample(rows, logits)
        if any(row.recording for row in rows):
            scaled = log_probabilities(logits / (self.sampling.temperature or 1.0), tokens)
            for row, token, log_prob in zip(rows, tokens, scaled, strict=True):
                row.draws.append(Draw(row.length, token, row.constraint, log_prob))
        for row, token, log_probability in zip(rows, tokens, log_probabilities(logits, tokens), strict=True):
            self.accept(row, token, log_probability)

    def accept(self, row: RowState, token: int, log_probability: float) -> None:
        """Add the token that was chosen for a row, and choose its next input."""
        if row.perceived_at is not None:
            seconds, row.perceived_at = time.perf_counter() - row.perceived_at, None
            for step in row.trace:
                step.seconds = step.seconds or seconds * (step.status != IGNORED)
        row.append(token)
        row.log_probability += log_probability
        row.next_input = self._next_input(row, token)
        self._check_length(row)

    def _sample(self, rows: list[RowState], logits: Tensor) -> list[int]:
        """One token for each row, from [n, vocabulary], where forbidden tokens become -inf."""
        self.constraints.mask_logits(logits, rows)
        return self.sampling.sample(logits, [row.rng for row in rows])

    def _next_input(self, row: RowState, token: int) -> RowInput | None:
        """The next input of a row that has chosen `token`; None where its answer is complete."""
        self._register_request(row, token)
        if token not in (self.vocabulary.im_end, *self._stops):
            return RowInput([token])
        asks = token == self.vocabulary.im_end
        if asks and self._at_limit(row):  # nothing could be said about what it were shown
            row.complete = not self.perceiver.requests(row)
            return None
        shown = self.perceiver.perceive(row) if asks else None
        row.complete = shown is None
        return shown

    def _register_request(self, row: RowState, token: int) -> None:
        """Note that a token begins a request for perception."""
        if token in self.parser.starts:
            row.actions_left -= 1
            if self.parser.starts[token] != REGION:
                row.pending_action, row.pending_states = self.parser.starts[token], []

    def _at_limit(self, row: RowState) -> bool:
        return len(row.output_ids) >= self.limits.max_new_tokens

    def _check_length(self, row: RowState) -> None:
        if self._at_limit(row):
            row.next_input = None

    def _take_control_states(self, row: RowState, hidden: Tensor) -> None:
        """Take control states of the action that a row has begun, [n, D]; force its control tokens once all are there.

        As in training, the states after the first are read over plain control tokens whose keys are not kept.
        """
        kind, count = row.pending_action, self.model.forward_config.projector_scale
        assert kind is not None
        controls = [self.vocabulary.actions[kind].control] * count
        row.pending_states.extend(hidden)
        if len(row.pending_states) < count:
            row.next_input = RowInput(controls[1:], keep=False)
            return
        states = self.intervention.states(torch.stack(row.pending_states), kind=kind, record=row.sample.record)
        row.turn_states.append(states)
        row.pending_action = None
        row.next_input = RowInput(controls, states=states if self.conditioned else None)
        row.append(*controls)
        self._check_length(row)

    def finalize(self, row: RowState) -> Answer:
        """The row's answer: the text of its last turn, and how it perceived."""
        ends = {self.vocabulary.im_end, *self._stops}
        token_ids = row.turn_ids[:-1] if row.turn_ids and row.turn_ids[-1] in ends else row.turn_ids
        trace = [*row.trace, *self.perceiver.ignored(row)]
        confidence = math.exp(row.log_probability)
        text = self.decode(token_ids).strip()
        return Answer(text, row.output_ids, trace, row.complete, row.control_states, confidence)


def log_probabilities(logits: Tensor, tokens: Sequence[int]) -> list[float]:
    """Log-probability of one token for each row of [n, vocabulary]."""
    chosen = torch.tensor(tokens, device=logits.device)[:, None]
    return logits.float().log_softmax(dim=-1).gather(1, chosen)[:, 0].tolist()
