"""Rollouts: answers drawn for training, and the batches that train on them.

Ids are trained on as they were drawn, and what was perceived is written into the conversation as it was shown: nothing
is decoded, parsed or tokenised again. A label is a token that was drawn among more than one permitted token; forced
tokens, control tokens, prompts and perceived turns are none.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from vpt.data.collate import collate
from vpt.data.processor import ProcessedImages, Processor, Sample
from vpt.evaluation.evaluator import prediction
from vpt.evaluation.predictions import Prediction
from vpt.evaluation.questions import EvalQuestion
from vpt.generation.generator import Generator
from vpt.generation.row_state import Draw, RowState
from vpt.perception.batch import IGNORE_INDEX, Batch, RowBuilder
from vpt.perception.rollouts import RolloutTokens


@dataclass(frozen=True)
class Rollout:
    """An answer that was drawn.

    Attributes:
        prediction: what was asked and answered, and the trace of perception.
        prompt: the sample that all rollouts of a group share.
        sample: the prompt and all that followed, labels where a token was drawn.
        draws: of the labels, in order.
        advantage: what it is worth beside the others of its group.
    """

    prediction: Prediction
    prompt: Sample
    sample: Sample
    draws: tuple[Draw, ...]
    advantage: float = 0.0

    @property
    def first_look_tokens(self) -> int:
        """Visual tokens of the prompt."""
        return sum(block.length for block in self.prompt.row.blocks)

    @property
    def perceived_tokens(self) -> int:
        """Visual tokens of everything that was perceived after the prompt."""
        return sum(block.length for block in self.sample.row.blocks) - self.first_look_tokens

    @property
    def continuation(self) -> Sample:
        """What follows the prompt, begun by the prompt's last token, which predicts the first drawn one."""
        start, own = len(self.prompt.ids) - 1, self.sample
        first = len(self.prompt.row.blocks)
        skipped = {source: len(images) for source, images in self.prompt.images.items()}
        blocks = tuple(
            replace(block, start=block.start - start, image=block.image - skipped.get(block.source, 0))
            for block in own.row.blocks[first:]
        )
        actions = tuple(
            replace(action, start=action.start - start, block=None if action.block is None else action.block - first)
            for action in own.row.actions
        )
        images = {source: entries[skipped.get(source, 0) :] for source, entries in own.images.items()}
        return replace(
            own, ids=own.ids[start:], labels=own.labels[start:], positions=own.positions[:, start:],
            row=replace(own.row, length=own.row.length - start, blocks=blocks, actions=actions, paragraphs=()),
            images={source: entries for source, entries in images.items() if entries},
        )  # fmt: skip

    @property
    def shareable(self) -> bool:
        """Whether the prompt is one segment, whose keys the rollouts of a group can share."""
        return not self.prompt.row.actions


def draw_rollouts(
    generator: Generator, questions: Sequence[EvalQuestion], *, numbers: Sequence[Sequence[int]]
) -> list[list[Rollout]]:
    """A group of rollouts for each question; `numbers` name the random numbers of each rollout of each group."""
    prompts = [generator.processor.encode_prompt(question.record, question.folder) for question in questions]
    groups = [pair for pair, own in zip(zip(questions, prompts, strict=True), numbers, strict=True) for _ in own]
    rows = generator.start(
        [prompt for _, prompt in groups], [question.folder for question, _ in groups],
        numbers=[number for own in numbers for number in own], recording=True,
    )  # fmt: skip
    for _ in generator.steps(rows):
        pass
    tokens = generator.processor.chat_template.encoder_tokens
    single = {n for n, one in enumerate(generator.constraints.forbidden.logical_not().sum(dim=-1).tolist()) if one == 1}
    rollouts = iter(
        Rollout(
            prediction(question, generator.finalize(row), tokens, seconds=0.0), row.sample,
            *training_sample(row, generator.processor, single=single),
        )
        for (question, _), row in zip(groups, rows, strict=True)
    )  # fmt: skip
    return [[next(rollouts) for _ in own] for own in numbers]


def training_sample(row: RowState, processor: Processor, *, single: set[int]) -> tuple[Sample, tuple[Draw, ...]]:
    """The conversation of a row that has answered, and the draws of its labels.

    Args:
        row: the row.
        processor: what made its prompt.
        single: constraints that leave one permitted token only.
    """
    prompt, kinds = row.sample, processor.chat_template.control_kinds
    conversation = RowBuilder(
        prompt.ids.tolist(), [IGNORE_INDEX] * len(prompt.ids), list(prompt.row.blocks), list(prompt.row.actions)
    )
    images: ProcessedImages = {source: list(entries) for source, entries in prompt.images.items()}
    for one in row.inputs:
        if one.ids[0] in kinds:
            conversation.action(kinds[one.ids[0]], len(one.ids), token=one.ids[0])
            continue
        done = 0
        for visual in one.visuals:
            span = visual.span
            conversation.add(one.ids[done : span.start])
            conversation.image(span.source, span.length, pad=one.ids[span.start])
            done = span.start + span.length
            key = ("perceived", str(id(visual.image)))  # an image that several rollouts see again is encoded once
            images.setdefault(span.source, []).append((key, visual.image))
        conversation.add(one.ids[done:])
    if row.draws[-1].position == len(conversation.ids):  # the last token, which nothing followed
        conversation.add([row.draws[-1].token])
    draws = tuple(draw for draw in row.draws if draw.constraint not in single)
    for draw in draws:
        assert conversation.ids[draw.position] == draw.token
        conversation.labels[draw.position] = draw.token
    return processor.build_sample(conversation, images, prompt.record), draws


def rollout_batch(
    groups: Sequence[Sequence[Rollout]], forbidden: torch.Tensor, *, temperature: float, share_prompts: bool = True
) -> Batch:
    """Rollouts, those of a group together, as one batch; each prompt runs once for its group where it can.

    Args:
        groups: rollouts with a label each.
        forbidden: `PerceptionConstraints.forbidden` of the generator that drew them.
        temperature: at which they were drawn.
        share_prompts: False runs every prompt once a rollout.
    """
    samples: list[Sample] = []
    prefixes: list[int | None] = []
    for group in groups:
        if share_prompts and len(group) > 1 and group[0].shareable:
            prefix = len(samples)
            samples += [_without_last(group[0].prompt), *(rollout.continuation for rollout in group)]
            prefixes += [None, *[prefix] * len(group)]
        else:
            samples += [rollout.sample for rollout in group]
            prefixes += [None] * len(group)
    rollouts = [rollout for group in groups for rollout in group]
    draws = [draw for rollout in rollouts for draw in rollout.draws]
    tokens = RolloutTokens(
        forbidden, torch.tensor([draw.constraint for draw in draws]),
        torch.tensor([number for number, rollout in enumerate(rollouts) for _ in rollout.draws]),
        torch.tensor([rollout.advantage for rollout in rollouts]), torch.tensor([draw.log_prob for draw in draws]),
        temperature=temperature,
    )  # fmt: skip
    return replace(collate(samples, prefixes=prefixes), rollouts=tokens)


def _without_last(prompt: Sample) -> Sample:
    """A prompt without its last token, and without labels: what the rollouts of a group go on from."""
    return replace(
        prompt, ids=prompt.ids[:-1], labels=torch.full_like(prompt.labels[:-1], IGNORE_INDEX),
        positions=prompt.positions[:, :-1], row=replace(prompt.row, length=prompt.row.length - 1, paragraphs=()),
    )  # fmt: skip


def looked(rollout: Rollout, kind: str | None = None) -> bool:
    """Whether a rollout was shown anything (of a kind)."""
    return any(kind in (None, step.kind) for step in rollout.prediction.perceived)
