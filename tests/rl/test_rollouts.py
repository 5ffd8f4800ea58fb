"""Rollouts and training are one walk: log-probabilities are the same numbers, shared prompts change nothing."""

from copy import deepcopy
from dataclasses import replace

import pytest
import torch

from conftest import ALL, samples_of
from helpers.gradients import MODEST, as_double
from helpers.scripted_generator import records
from vpt.evaluation.questions import EvalQuestion
from vpt.generation.generator import Generator
from vpt.generation.row_state import GenerationLimits
from vpt.generation.sampling import Sampling
from vpt.rl.rollouts import draw_rollouts, rollout_batch


class Opening(Generator):
    """Begins every row with one of some scripts in turn, then draws freely."""

    scripts = ([],)

    def start(self, *arguments, **options):
        rows = super().start(*arguments, **options)
        self.left = {id(row): list(self.scripts[n % len(self.scripts)]) for n, row in enumerate(rows)}
        return rows

    def _sample(self, rows, logits):
        free = super()._sample(rows, logits)
        return [
            self.left[id(row)].pop(0) if self.left[id(row)] else token for row, token in zip(rows, free, strict=True)
        ]


def openings(vocabulary):
    """The first turns of four rollouts: a region, nothing, DINOv2, SAM."""
    v = vocabulary
    region = [v.region_start, v.x[1], v.y[0], v.x[5], v.y[6], v.region_end, v.im_end]
    dino, sam = (v.actions[name] for name in ("dino", "sam"))
    return [region, [], [dino.start, dino.end, v.im_end], [sam.start, sam.end, v.im_end]]


def drawn(parts, folder, *, temperature=0.7, action="free", size=4, limit=24):
    """Two groups of rollouts, and the generator that drew them."""
    samples = samples_of(parts, folder, records()[:2])
    questions = [EvalQuestion(sample.record, folder, "test", n) for n, sample in enumerate(samples)]
    limits, sampling = GenerationLimits(limit, 2, action=action), Sampling(temperature, seed=3)
    generator = Opening(parts.model.eval(), parts.processor, parts.tokenizer.decode, limits, sampling)
    generator.scripts = openings(parts.model.vocabulary) if action == "free" else [[]]
    numbers = [range(n * size, (n + 1) * size) for n in range(len(questions))]
    return generator, draw_rollouts(generator, questions, numbers=numbers)


@pytest.mark.parametrize("options", [[], ["model.projector_scale=2"], ["model.inner_forward=full"]], ids=str)
def test_training_has_the_log_probabilities_of_the_rollouts(make_parts, folder, options):
    parts = make_parts(*ALL, *options)
    generator, groups = drawn(parts, folder)
    kinds = [step.kind for group in groups for one in group for step in one.prediction.trace]
    assert {"region", "dino", "sam"} <= {*kinds}
    constraints = generator.constraints.forbidden
    apart, shared = (
        rollout_batch(groups, constraints, temperature=0.7, share_prompts=share) for share in (False, True)
    )
    assert len(shared.input_ids) < len(apart.input_ids)
    with torch.no_grad():
        for batch in (apart, shared):
            torch.testing.assert_close(-parts.model(batch).nll, apart.rollouts.log_probs, rtol=0, atol=1e-4)
        exact = deepcopy(parts.model).double()  # float32 rounds otherwise on every processor
        one, two = (exact(as_double(batch)) for batch in (apart, shared))
    torch.testing.assert_close(two.nll, one.nll, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(two.entropy, one.entropy, rtol=1e-6, atol=1e-6)
    assert one.targets.tolist() == two.targets.tolist()


def test_gradients_through_a_shared_prompt(make_parts, folder):
    parts = make_parts(*ALL, *MODEST)
    generator, groups = drawn(parts, folder)
    found = []
    for share in (False, True):
        batch = rollout_batch(groups, generator.constraints.forbidden, temperature=0.7, share_prompts=share)
        weights = torch.linspace(-1, 1, batch.num_labels)
        parts.model.zero_grad()
        (parts.model(batch).nll * weights).sum().backward()
        found.append({name: p.grad.clone() for name, p in parts.model.named_parameters() if p.grad is not None})
    assert found[0].keys() == found[1].keys()
    for name, value in found[0].items():
        difference, size = (found[1][name] - value).norm(), value.norm()
        assert difference <= 1e-5 * size + 1e-7, (name, difference / size)


def test_what_carries_a_label(all_parts, folder):
    """Drawn tokens alone: no prompt, no perceived turn, no control token, no token that was the only one permitted."""
    v = all_parts.model.vocabulary
    _, groups = drawn(all_parts, folder, action="dino", size=2)
    controls = {action.control for action in v.actions.values()}
    opening = [v.actions["dino"].start, v.actions["dino"].end, v.im_end]
    for one in (rollout for group in groups for rollout in group):
        labelled = (one.sample.labels != -100).nonzero().flatten().tolist()
        assert [draw.position for draw in one.draws] == labelled
        after = len(one.prompt.ids)
        assert labelled[0] > after + len(opening), "the forced opening carries none"
        shown = one.sample.row.blocks[len(one.prompt.row.blocks)]
        assert not any(shown.start <= position < shown.start + shown.length for position in labelled)
        assert not controls & {int(one.sample.ids[position]) for position in labelled}
        assert one.perceived_tokens == sum(step.visual_tokens for step in one.prediction.trace) > 0
        assert one.sample.ids[:after].tolist() == one.prompt.ids.tolist()


def test_groups_share_what_is_encoded(make_parts, folder):
    parts = make_parts(*ALL)
    generator, groups = drawn(parts, folder, action="dino", size=4)
    batch = rollout_batch(groups, generator.constraints.forbidden, temperature=0.7)
    transform = parts.model.transform_of("dino")
    assert len(batch.images[transform].tokens) == len(groups), "one image a group, however many look at it again"


def test_ids_of_drawn_rollouts_do_not_depend_on_the_batch(make_parts, folder):
    parts = make_parts(*ALL)
    samples = samples_of(parts, folder, records()[:2])
    questions = [EvalQuestion(sample.record, folder, "test", n) for n, sample in enumerate(samples)]
    generator = Generator(
        parts.model.eval(), parts.processor, parts.tokenizer.decode, GenerationLimits(8, 2), Sampling(1.0, seed=1)
    )
    together = draw_rollouts(generator, questions, numbers=[range(3), range(3, 6)])
    alone = [
        draw_rollouts(generator, [question], numbers=[[n]])[0][0]
        for n, question in ((1, questions[0]), (5, questions[1]))
    ]
    assert together[0][1].sample.ids.tolist() == alone[0].sample.ids.tolist()
    assert together[1][2].sample.ids.tolist() == alone[1].sample.ids.tolist()
    assert replace(together[0][1], advantage=1.0).advantage == 1.0
